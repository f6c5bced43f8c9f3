"""Running code without data: shapes as on a real device, and the values that code reads on the host."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from app.planning.live import LiveBytes
from app.planning.meta import MetaExecution, UnknownValueError
from modules.ops.documents import DocumentLayout
from tests.modules.helpers import document_ids


def ignore(_: Tensor) -> None:
    pass


def test_document_borders_are_known() -> None:
    ids = document_ids([3, 5], [8], [1, 1, 6])
    expected = DocumentLayout(ids).spans
    execution = MetaExecution(ignore)
    with execution.running():
        layout = DocumentLayout(execution.make_known(ids))
        assert layout.spans == expected == [(0, 3), (3, 8), (8, 16), (16, 17), (17, 18), (18, 24)]
        assert layout.boundaries.is_meta


def test_values_are_forgotten_when_something_unknown_overwrites_them() -> None:
    execution = MetaExecution(ignore)
    with execution.running():
        counts = torch.zeros(4, dtype=torch.int64, device="meta")
        counts[1:] += 2
        assert counts.tolist() == [0, 2, 2, 2]
        assert int(counts.sum()) == 6
        counts += torch.empty(4, device="meta").argsort()
        with pytest.raises(UnknownValueError):
            counts.tolist()
        with pytest.raises(UnknownValueError):
            bool(torch.empty((), device="meta"))


def products(x: Tensor, weight: Tensor) -> list[Tensor]:
    """Operations of every kind: views, in place, new storage, several results."""
    y = F.linear(x, weight)
    z = y.transpose(0, 1).exp()
    values, indices = z.topk(2, dim=-1)
    z.mul_(2.0).add_(values[..., :1])
    return [
        y,
        z,
        values,
        indices,
        y.split(2, dim=-1)[1],
        F.silu(y.t()),
        torch.cat([y, y]),
        y.sum(0, dtype=torch.float64),
    ]


def test_results_are_laid_out_as_on_the_cpu() -> None:
    x, weight = torch.randn(6, 5), torch.randn(4, 5)
    expected = products(x, weight)
    for _ in range(2):  # worked out, then remembered
        with MetaExecution(ignore).running():
            got = products(torch.empty(6, 5, device="meta"), torch.empty(4, 5, device="meta"))
        for mine, real in zip(got, expected, strict=True):
            assert (mine.shape, mine.stride(), mine.dtype) == (real.shape, real.stride(), real.dtype)
        assert got[4].untyped_storage()._cdata == got[0].untyped_storage()._cdata, "a view stays one"


def test_live_bytes() -> None:
    live = LiveBytes()
    with MetaExecution(live.observe).running():
        x = torch.empty(100, device="meta")
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
