"""Packed attention equals a softmax under a dense mask."""

import pytest
import torch
from torch import Tensor

from modules.ops.attention import _attend, attention
from modules.ops.documents import DocumentLayout
from tests.modules.helpers import assert_close, document_ids

LENGTH = 13
ROWS = {
    "one document": ([13], [13]),
    "several": ([1, 5, 7], [12, 1]),
    "single tokens": ([1] * 13, [6, 7]),
    "border between rows only": ([13], [4, 9]),
}


def make_inputs(query_heads: int, key_heads: int, head_dim: int = 5, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(query_heads + key_heads)
    heads = (query_heads, key_heads, key_heads)
    return [(scale * torch.randn(2, LENGTH, count, head_dim, generator=generator)).requires_grad_() for count in heads]


def dense(query: Tensor, key: Tensor, value: Tensor, ids: Tensor) -> Tensor:
    """Softmax over all positions with a mask, query head q reading key head q // (Q / K)."""
    repeats = query.shape[2] // key.shape[2]
    position = torch.arange(query.shape[1])
    allowed = (ids[:, :, None] == ids[:, None, :]) & (position[:, None] >= position)
    heads = []
    for head in range(query.shape[2]):
        scores = query[:, :, head] @ key[:, :, head // repeats].transpose(1, 2) / query.shape[-1] ** 0.5
        heads.append(scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ value[:, :, head // repeats])
    return torch.stack(heads, dim=2)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize(("query_heads", "key_heads"), [(4, 4), (4, 2), (4, 1), (1, 1), (6, 3)])
def test_equals_masked_softmax(query_heads: int, key_heads: int, rows: tuple[list[int], list[int]]) -> None:
    ids, inputs = document_ids(*rows), make_inputs(query_heads, key_heads)
    probe = torch.randn(2, LENGTH, query_heads, 5, generator=torch.Generator().manual_seed(9))
    actual, expected = attention(*inputs, DocumentLayout(ids)), dense(*inputs, ids)
    assert_close(actual, expected, 1e-5)
    pairs = zip(
        torch.autograd.grad((actual * probe).sum(), inputs),
        torch.autograd.grad((expected * probe).sum(), inputs),
        strict=True,
    )
    for gradient, expected_gradient in pairs:
        assert_close(gradient, expected_gradient, 1e-4, "gradient")


def test_the_mask_form_equals_masked_softmax() -> None:
    """The form of fp32 on CUDA."""
    ids, inputs = document_ids([1, 5, 7], [12, 1]), make_inputs(4, 2)
    assert_close(_attend(*inputs, DocumentLayout(ids).mask), dense(*inputs, ids), 1e-5)


def test_no_layout_means_one_document_a_row() -> None:
    inputs = make_inputs(4, 2)
    assert_close(attention(*inputs), dense(*inputs, document_ids([LENGTH], [LENGTH])), 1e-5)


def test_large_scores_stay_finite() -> None:
    inputs = make_inputs(4, 2, scale=30.0)
    ids = document_ids([6, 7], [13])
    out = attention(*inputs, DocumentLayout(ids))
    assert_close(out, dense(*inputs, ids), 1e-4)
    for gradient in torch.autograd.grad(out.sum(), inputs):
        assert gradient.isfinite().all()


def test_bf16_result_is_bf16_and_near() -> None:
    low = [tensor.detach().bfloat16() for tensor in make_inputs(4, 2)]
    ids = document_ids([6, 7], [13])
    out = attention(*low, DocumentLayout(ids))
    assert out.dtype == torch.bfloat16
    assert_close(out, dense(*(tensor.float() for tensor in low), ids), 2e-2)
