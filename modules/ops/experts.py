"""Matrix product of rows sorted by expert with each expert's own weight.

On CUDA `F.grouped_mm`, which wants row strides that are multiples of 16 bytes (other widths are padded). On a CPU a
loop over the experts too (as `F.grouped_mm` does there), with the rows of an expert rounded up to a multiple of
`_ROWS` in bf16: oneDNN compiles a kernel for each new shape, and no two steps send an expert the same number of rows
(3.6 times the time of the products, and half a gigabyte of kernels). What the rounding takes in of the next expert's
rows is written over when its turn comes.
Shapes: R rows, E experts, I in-features, O out-features.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from modules.ops.kernels import uncompiled

_ALIGNMENT_BYTES = 16
_ROWS = 16


@uncompiled  # torch.compile cannot trace `F.grouped_mm` in fp32
def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply rows of `x` by the weight of the expert they belong to.

    Args:
        x: [R, I], rows sorted by expert.
        weight: [E, O, I], dtype of `x`.
        offsets: int32 [E], end row of each expert; the last is R.

    Returns:
        [R, O] in the dtype of `x`.
    """
    if not x.is_cuda:
        return _LoopedLinear.apply(x, weight, offsets)
    return _grouped_mm(x, weight, offsets) if len(x) else F.linear(x, weight[0])


def _grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply by `F.grouped_mm`, with zeros up to the widths that it takes."""
    multiple = _ALIGNMENT_BYTES // x.element_size()
    out_features, in_features = weight.shape[1:]
    more_out, more_in = -out_features % multiple, -in_features % multiple
    if more_out or more_in:
        x, weight = F.pad(x, (0, more_in)), F.pad(weight, (0, more_in, 0, more_out))
    out = F.grouped_mm(x, weight.transpose(-2, -1), offs=offsets)
    return out[:, :out_features] if more_out else out


class _LoopedLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(x, weight, offsets)
        return _multiply_rows(x, weight.transpose(1, 2), offsets)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401
        grad: Tensor,
    ) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = _multiply_rows(grad, weight, offsets) if ctx.needs_input_grad[0] else None
        return grad_x, _outer_products(grad, x, offsets) if ctx.needs_input_grad[1] else None, None


# Operations of their own: on the meta device they need no row counts, and counters of matrix products count the rows
# that were asked for.


@torch.library.custom_op("superbolt::multiply_rows", mutates_args=())
def _multiply_rows(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply rows [R, K] sorted by expert by matrices [E, K, M] (any strides); returns [R, M]."""
    out = x.new_empty(len(x), weight.shape[2])
    for matrix, start, end, rounded in _row_ranges(weight, offsets, x.dtype):
        if rounded <= len(x):
            torch.mm(x[start:rounded], matrix, out=out[start:rounded])
        else:
            out[start:end] = torch.mm(F.pad(x[start:end], (0, 0, 0, rounded - end)), matrix)[: end - start]
    return out


@torch.library.custom_op("superbolt::outer_products", mutates_args=())
def _outer_products(grad: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """Return [E, O, I]: grad^T x over the rows [R, O] and [R, I] of each expert."""
    out = x.new_zeros(len(offsets), grad.shape[1], x.shape[1])
    for matrix, start, end, rounded in _row_ranges(out, offsets, x.dtype):
        rows = F.pad(grad[start:end], (0, 0, 0, rounded - end)) if rounded > end else grad[start:end]
        others = x[start:rounded] if rounded <= len(x) else F.pad(x[start:end], (0, 0, 0, rounded - end))
        torch.mm(rows.T, others, out=matrix)
    return out


def _row_ranges(matrices: Tensor, offsets: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, int, int, int]]:
    """Yield (matrix, start row, end row, end row of the rounded number of rows) of each expert that has rows."""
    multiple = 1 if dtype == torch.float32 else _ROWS
    start = 0
    for matrix, end in zip(matrices.unbind(), offsets.tolist(), strict=True):
        if end > start:
            yield matrix, start, end, start - (start - end) // multiple * multiple
        start = end


@_multiply_rows.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(len(x), weight.shape[2])


@_outer_products.register_fake
def _(grad: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(len(offsets), grad.shape[1], x.shape[1])


@register_flop_formula(torch.ops.superbolt.multiply_rows)
def _(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:  # noqa: ANN401
    return 2 * x[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.superbolt.outer_products)
def _(grad: torch.Size, x: torch.Size, *_: Any, **__: Any) -> int:  # noqa: ANN401
    return 2 * grad[0] * grad[1] * x[1]
