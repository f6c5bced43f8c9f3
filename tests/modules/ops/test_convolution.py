"""The causal convolution equals `nn.Conv1d` with left padding, run on each document alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.ops.convolution import shifted_convolution, spaced_convolution
from modules.ops.documents import DocumentLayout
from tests.modules.helpers import assert_close, document_ids, spans

BOTH = pytest.mark.parametrize("convolution", [spaced_convolution, shifted_convolution])
ROWS = {
    "one document": ([17], [17]),
    "short documents": ([1, 2, 3, 4, 7], [1] * 17),
    "two halves": ([8, 9], [16, 1]),
}


def make_inputs(taps: int, bias: bool) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(taps)
    shapes = [(2, 17, 6), (6, taps), (6,)]
    x, weight, offset = (torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)
    return [x, weight, offset if bias else None]


def per_document(x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    channels, taps = weight.shape
    convolution = nn.Conv1d(channels, channels, taps, groups=channels, bias=bias is not None)
    values = {"weight": weight.unsqueeze(1)} | ({} if bias is None else {"bias": bias})
    out = torch.empty_like(x)
    for row, positions in spans(ids):
        padded = F.pad(x[row, positions].T, (taps - 1, 0))
        out[row, positions] = F.silu(torch.func.functional_call(convolution, values, padded.unsqueeze(0)))[0].T
    return out


@BOTH
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize(("taps", "bias"), [(1, True), (2, True), (3, False), (4, True), (4, False), (20, True)])
def test_equals_conv1d_on_each_document(taps: int, bias: bool, rows: tuple[list[int], list[int]], convolution) -> None:
    ids, inputs = document_ids(*rows), make_inputs(taps, bias)
    probe = torch.randn(2, 17, 6, generator=torch.Generator().manual_seed(9))
    leaves = [tensor for tensor in inputs if tensor is not None]
    actual = convolution(*inputs, DocumentLayout(ids))
    expected = per_document(*inputs, ids)
    assert_close(actual, expected, 1e-5)
    pairs = zip(
        torch.autograd.grad((actual * probe).sum(), leaves),
        torch.autograd.grad((expected * probe).sum(), leaves),
        strict=True,
    )
    for gradient, expected_gradient in pairs:
        assert_close(gradient, expected_gradient, 1e-5, "gradient")


@BOTH
def test_no_layout_means_one_document_a_row(convolution) -> None:
    inputs = make_inputs(4, True)
    assert_close(convolution(*inputs, None), per_document(*inputs, document_ids([17], [17])), 1e-5)


@BOTH
def test_bf16_result_is_bf16_and_near(convolution) -> None:
    x, weight, bias = make_inputs(4, True)
    ids = document_ids([5, 12], [17])
    out = convolution(x.bfloat16(), weight, bias, DocumentLayout(ids))
    assert out.dtype == torch.bfloat16
    assert_close(out, per_document(x.bfloat16().float(), weight, bias, ids), 2e-2)
