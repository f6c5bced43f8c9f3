"""Bytes of tensors that are alive, and results as on a real device, of operations on tensors without values."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from app.planning.live import LiveBytes


@pytest.fixture
def live():
    with FakeTensorMode() as mode, LiveBytes(mode, {}) as live:
        yield live


def test_live_bytes(live: LiveBytes) -> None:
    x = torch.empty(100)
    y = x + 1
    view = y[:10]
    assert (live.now, live.peak) == (800, 800)
    del y
    assert live.now == 800, "the view holds it"
    del view
    assert (live.now, live.peak) == (400, 800)
    live.restart()
    x.exp_()
    assert live.peak == 400
    x + 1
    assert (live.now, live.peak) == (400, 800), "a result that was made before is counted too"


def test_storages_that_change_their_size(live: LiveBytes) -> None:
    whole, part = torch.empty(100), torch.empty(10)
    live.watch([whole])
    whole.untyped_storage().resize_(0)
    live.restart()
    assert live.now == 40
    more = part + 1
    assert live.peak == 80, "less is seen before a peak is believed"
    whole.untyped_storage().resize_(400)
    whole.copy_(whole)
    whole.untyped_storage().resize_(0)
    del more
    assert (live.now, live.peak, live.watched_peak) == (40, 480, 400), "more is seen when it is written"


def products(x: Tensor, weight: Tensor) -> list[Tensor]:
    """Operations of every kind: views, in place, new storage, several results, numbers of either type."""
    y = F.linear(x, weight)
    z = y.transpose(0, 1).exp()
    values, indices = z.topk(2, dim=-1)
    z.mul_(2.0).add_(values[..., :1])
    torch.mm(x, weight.T, out=torch.empty_like(y))
    return [
        y,
        z,
        values,
        indices,
        y.split(2, dim=-1)[1],
        F.silu(y.t()),
        torch.cat([y, y]),
        y.sum(0, dtype=torch.float64),
        indices * 2,
        indices * 2.0,
        y.flatten()[3:7],
    ]


def test_results_are_laid_out_as_on_the_cpu(live: LiveBytes) -> None:
    with torch.utils._python_dispatch._disable_current_modes():
        expected = products(torch.randn(6, 5), torch.randn(4, 5))
    for _ in range(2):  # worked out, then made again
        got = products(torch.empty(6, 5), torch.empty(4, 5))
        for mine, real in zip(got, expected, strict=True):
            assert (mine.shape, mine.stride(), mine.dtype) == (real.shape, real.stride(), real.dtype)
            assert mine.storage_offset() == real.storage_offset()
            assert mine.untyped_storage().nbytes() == real.untyped_storage().nbytes()
        assert got[4].untyped_storage()._cdata == got[0].untyped_storage()._cdata, "a view stays one"


def test_a_value_that_depends_on_data_is_not_made_up(live: LiveBytes) -> None:
    with pytest.raises(DataDependentOutputException):
        bool(torch.empty(()) > 0)
