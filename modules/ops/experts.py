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

from modules.ops import scaled
from modules.ops.kernels import device_kind, uncompiled

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
    if device_kind(x) != "cuda" or x.dtype == torch.float32:  # whose `F.grouped_mm` is a loop too, and needs values
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
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, offsets)
        return multiply_rows(x, weight.transpose(1, 2), offsets, None)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        grad: Tensor,
    ) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = multiply_rows(grad, weight, offsets, None) if ctx.needs_input_grad[0] else None
        return grad_x, outer_products(grad, x, offsets, None) if ctx.needs_input_grad[1] else None, None


# Operations of their own: on the meta device they need no row counts, and counters of matrix products count the rows
# that were asked for.


@torch.library.custom_op("superbolt::multiply_rows", mutates_args=())
def multiply_rows(x: Tensor, weight: Tensor, offsets: Tensor, scale: Tensor | None) -> Tensor:
    """Multiply rows by the matrix of the expert they belong to, and by its number.

    Args:
        x: [R, K], rows sorted by expert.
        weight: [E, K, M], dtype of `x`, any strides.
        offsets: int32 [E], end row of each expert; the last is R.
        scale: fp32 [E], or None for ones. On a CPU the result is rounded once, behind it.

    Returns:
        [R, M] in the dtype of `x`.
    """
    if device_kind(x) == "cuda":
        out = _grouped_mm(x, weight.transpose(1, 2), offsets) if len(x) else F.linear(x, weight[0].T)
        return out if scale is None else (out * scale[row_experts(len(x), offsets), None]).to(x.dtype)
    out, factors = x.new_empty(len(x), weight.shape[2]), None if scale is None else scale.tolist()
    for expert, start, end, rounded in _row_ranges(offsets, x.dtype):
        factor = None if factors is None else factors[expert]
        if rounded <= len(x):
            _multiply(x[start:rounded], weight[expert], factor, out[start:rounded])
        else:
            rows = F.pad(x[start:end], (0, 0, 0, rounded - end))
            out[start:end] = _multiply(rows, weight[expert], factor)[: end - start]
    return out


@torch.library.custom_op("superbolt::outer_products", mutates_args=())
def outer_products(grad: Tensor, x: Tensor, offsets: Tensor, scale: Tensor | None) -> Tensor:
    """Return grad^T x over the rows of each expert, times its number.

    Args:
        grad: [R, O], rows sorted by expert.
        x: [R, I], dtype of `grad`.
        offsets: int32 [E], end row of each expert; rows behind the last are left out.
        scale: fp32 [E], or None for ones. On a CPU the result is rounded once, behind it.

    Returns:
        [E, O, I] in the dtype of `grad`.
    """
    features = grad.shape[1]
    if device_kind(x) == "cuda":
        multiple = _ALIGNMENT_BYTES // x.element_size()
        grad, others = (F.pad(rows, (0, -rows.shape[1] % multiple)) for rows in (grad, x))
        out = F.grouped_mm(grad.T, others, offs=offsets)[:, :features, : x.shape[1]]
        return out.contiguous() if scale is None else (out * scale[:, None, None]).to(x.dtype)
    out, factors = x.new_zeros(len(offsets), features, x.shape[1]), None if scale is None else scale.tolist()
    for expert, start, end, rounded in _row_ranges(offsets, x.dtype):
        rows = F.pad(grad[start:end], (0, 0, 0, rounded - end)) if rounded > end else grad[start:end]
        others = x[start:rounded] if rounded <= len(x) else F.pad(x[start:end], (0, 0, 0, rounded - end))
        _multiply(rows.T, others, None if factors is None else factors[expert], out[expert])
    return out


def row_experts(rows: int, offsets: Tensor) -> Tensor:
    """Return the expert of each of R rows, int64 [R]; E behind the last end row."""
    return torch.searchsorted(offsets, torch.arange(rows, device=offsets.device, dtype=offsets.dtype), right=True)


def padded_places(rows: int, offsets: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return where rows go when every expert's are filled up to whole blocks.

    Args:
        rows: R.
        offsets: int32 [E], end row of each expert.
        block: rows in a block.

    Returns:
        (int64 [R], new place of each row; int32 [E], new end rows).
    """
    counts = torch.diff(offsets, prepend=offsets.new_zeros(1))
    ends = ((counts + block - 1) // block * block).cumsum(0).int()
    shift = ends - (counts + block - 1) // block * block - (offsets - counts)
    return torch.arange(rows, device=offsets.device) + shift[row_experts(rows, offsets)], ends


def _multiply(a: Tensor, b: Tensor, factor: float | None, out: Tensor | None = None) -> Tensor:
    return torch.mm(a, b, out=out) if factor is None else scaled.multiply(a, b, factor, out)


def _row_ranges(offsets: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, int, int, int]]:
    """Yield (expert, start row, end row, end row of the rounded number of rows) of each expert that has rows."""
    multiple = 1 if dtype == torch.float32 else _ROWS
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            yield expert, start, end, start - (start - end) // multiple * multiple
        start = end


@multiply_rows.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor, scale: Tensor | None) -> Tensor:
    return x.new_empty(len(x), weight.shape[2])


@outer_products.register_fake
def _(grad: Tensor, x: Tensor, offsets: Tensor, scale: Tensor | None) -> Tensor:
    return x.new_empty(len(offsets), grad.shape[1], x.shape[1])


@register_flop_formula(torch.ops.superbolt.multiply_rows)
def _(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * x[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.superbolt.outer_products)
def _(grad: torch.Size, x: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * grad[0] * grad[1] * x[1]
