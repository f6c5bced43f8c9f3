"""Attention over keys and values in FP8, against a loop over queries with both rounded value by value."""

import math

import pytest
import torch
from torch import Tensor

from modules.backbone.attention import Attention
from modules.backbone.cache import AttentionState, CachePass
from modules.ops.documents import DocumentLayout
from modules.ops.native import quantization as native
from tests.modules.helpers import assert_close, document_ids, spans, tiny_config

E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
SCALES = (0.004, 0.03)
"""Keys reach about 2.5 and saturate beyond 1.8, values lie among the coarse numbers of E4M3."""


@pytest.fixture(params=["C code", "portable"], autouse=True)
def _quantiser(request, monkeypatch):
    if request.param == "portable":
        monkeypatch.setattr(native, "load", lambda: (None, "switched off"))
    elif native.load()[0] is None:
        pytest.skip(native.load()[1])


@pytest.fixture
def mixer() -> Attention:
    mixer = Attention(tiny_config())
    generator = torch.Generator().manual_seed(3)
    for parameter in mixer.parameters():
        parameter.data.normal_(0, 0.15, generator=generator)
    mixer.kv_scales = SCALES
    return mixer


def e4m3(x: Tensor, scale: float) -> Tensor:
    """Return float64 the nearest of all E4M3 numbers times the scale."""
    size = (x.double() / scale).abs()
    return E4M3[(size.unsqueeze(-1) - E4M3).abs().argmin(-1)] * x.sign() * scale


def expected(mixer: Attention, x: Tensor, scales: tuple[float, float] | None = SCALES) -> Tensor:
    """Return float64 [T, D] of one document [T, D], query by query."""
    x = x.double()
    query, key, value = (x @ module.weight.double().T for module in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    if scales is not None:
        key, value = e4m3(key, scales[0]), e4m3(value, scales[1])
    width = mixer.head_dim
    shared = query.shape[1] // key.shape[1]
    out = torch.empty_like(query)
    for position in range(len(x)):
        for head in range(query.shape[1] // width):
            ours = slice(head * width, (head + 1) * width)
            theirs = slice(head // shared * width, (head // shared + 1) * width)
            scores = key[: position + 1, theirs] @ query[position, ours] / math.sqrt(width)
            out[position, ours] = scores.softmax(0) @ value[: position + 1, theirs]
    return out @ mixer.o_proj.weight.double().T


@torch.no_grad()
def test_packed_documents(mixer) -> None:
    ids = document_ids([5, 7, 4], [16])
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    y = mixer(x, DocumentLayout(ids))
    for row, span in spans(ids):
        assert_close(y[row, span], expected(mixer, x[row, span]), 1e-5)
    assert_close(mixer(x, None)[0], expected(mixer, x[0]), 1e-5)
    mixer.kv_scales = None
    plain = expected(mixer, x[0], None)
    assert_close(mixer(x, None)[0], plain, 1e-5)
    assert (plain - expected(mixer, x[0])).abs().max() > 0.02 * plain.abs().max(), "the scales change something"


@torch.no_grad()
def test_in_pieces_with_a_cache(mixer) -> None:
    """Tokens one by one, several at once, of rows of unequal length, and held ones that others replace."""
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    state = AttentionState(tiny_config(), 2, 20, torch.float32, x.device)

    def run(starts: list[int], length: int, hold: bool = False) -> Tensor:
        state.step = CachePass(starts, length, None, hold, x.device)
        pieces = [x[row, start : start + length] for row, start in enumerate(starts)]
        return mixer(torch.stack(pieces), None, state)

    parts = [run([0, 0], 6), run([6, 6], 1)]
    run([7, 7], 5, hold=True)
    state.advance([2, 0])
    whole = [expected(mixer, row) for row in x]
    assert_close(torch.cat(parts, 1), torch.stack(whole)[:, :7], 1e-5)
    unequal = run([9, 7], 3)
    for row, start in enumerate([9, 7]):
        assert_close(unequal[row], whole[row][start : start + 3], 1e-5)


def test_there_is_no_gradient_that_would_be_wrong(mixer) -> None:
    with pytest.raises(AssertionError, match="no gradient"):
        mixer(torch.randn(1, 4, 32), None)
