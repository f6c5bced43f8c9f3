"""Quantised products on any device: operands are rounded to their format and multiplied in bf16.

bf16 holds the numbers of every format times its block scales exactly, and the sums are fp32; the tensors' scales are
applied to the sums. So a product has the terms that the hardware adds up, in another order.

A product sums along one axis, the blocks of both operands lie along it, and what does not fill a block is filled with
zeros: features for y = x W^T and dx = g W, tokens for dW = g^T x. Inputs and weight are quantised again for the
backward pass rather than kept: a few per cent of the time, and no memory beyond that of an unquantised module.
A backward product in bf16 multiplies inputs and weight as a quantised forward product left them (see `Products`).
Of experts each has its own tensor scales, of inputs and gradients too, as if it were a module of its own.
Shapes: N tokens, R rows sorted by expert, E experts, I in-features, O out-features, K the axis of the sum.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from modules.ops.experts import multiply_rows, outer_products, padded_places, row_experts
from modules.ops.kernels import uncompiled
from modules.ops.scaled import scaled_product
from modules.precision import fp8, mxfp8, nvfp4
from modules.precision.formats import QUANTIZED, Format, broadcast_scale, tensor_amax
from modules.precision.hadamard import rotate
from modules.precision.scheme import Arithmetic, Products, Scheme

_BLOCKS: dict[Format, int] = {"nvfp4": nvfp4.BLOCK, "mxfp8": mxfp8.BLOCK}
"""Numbers that share a scale along the axis of the sum; 1 in the other formats."""

_FP8 = {"x": torch.float8_e4m3fn, "w": torch.float8_e4m3fn, "g": torch.float8_e5m2}
"""Kinds of FP8, as in Transformer Engine's hybrid recipe: gradients need range more than precision."""

Kind = Literal["x", "w", "g"]
"""Inputs, weight, gradient of the results."""


class Operand(NamedTuple):
    """A quantised operand: `values * scale`."""

    values: Tensor
    """bf16, padded along the axis of the sum."""
    scale: Tensor
    """fp32: a scalar, or of the leading axes that have tensor scales of their own."""


class Emulated:
    """The backend; runs everywhere, in every format."""

    name = "emulated"
    shows_operands = True

    def refusal(
        self,
        products: Products,
        arithmetic: Arithmetic,
        shape: torch.Size,
        device_type: str,
        capability: tuple[int, int] | None = None,
    ) -> str:
        """See `Backend`."""
        return ""

    @uncompiled  # its random numbers come from a generator of its own
    def linear(self, x: Tensor, weight: Tensor, scheme: Scheme) -> Tensor:
        """See `Backend`."""
        return _Linear.apply(x, weight, scheme)

    @uncompiled
    def grouped_linear(self, x: Tensor, weight: Tensor, offsets: Tensor, scheme: Scheme) -> Tensor:
        """See `Backend`."""
        return _GroupedLinear.apply(x, weight, offsets, scheme)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scheme: Scheme) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.scheme = scheme
        rows = x.flatten(0, -2)
        a, b = _quantize(scheme, "fprop", "x", rows, -1), _quantize(scheme, "fprop", "w", weight, -1)
        out = scaled_product(a.values, b.values.T, a.scale * b.scale)
        return torch.ops.aten._unsafe_view(out, [*x.shape[:-1], len(weight)])

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        grad: Tensor,
    ) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        rows, grad = x.flatten(0, -2), grad.flatten(0, -2)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            a, b = _quantize(ctx.scheme, "dgrad", "g", grad, -1), _quantize(ctx.scheme, "dgrad", "w", weight, -2)
            grad_x = scaled_product(a.values, b.values, a.scale * b.scale).view_as(x)
        if ctx.needs_input_grad[1]:
            a, b = _quantize(ctx.scheme, "wgrad", "g", grad, -2), _quantize(ctx.scheme, "wgrad", "x", rows, -2)
            grad_weight = scaled_product(a.values.T, b.values, a.scale * b.scale)
        return grad_x, grad_weight, None


class _GroupedLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor, scheme: Scheme) -> Tensor:
        ctx.save_for_backward(x, weight, offsets)
        ctx.scheme = scheme
        a, b = _quantize_rows(scheme, "fprop", "x", x, offsets), _quantize(scheme, "fprop", "w", weight, -1)
        return multiply_rows(a.values, b.values.transpose(1, 2), offsets, a.scale * b.scale)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        grad: Tensor,
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, offsets = ctx.saved_tensors
        scheme, grad_x, grad_weight = ctx.scheme, None, None
        if ctx.needs_input_grad[0]:
            a, b = _quantize_rows(scheme, "dgrad", "g", grad, offsets), _quantize(scheme, "dgrad", "w", weight, -2)
            grad_x = multiply_rows(a.values, b.values, offsets, a.scale * b.scale)
        if ctx.needs_input_grad[1]:
            if scheme.products.wgrad in QUANTIZED:
                block = _BLOCKS.get(scheme.products.wgrad, 1)
                places, ends = padded_places(len(x), offsets, block)
                a = _quantize_columns(scheme, "g", grad, places, ends, block)
                b = _quantize_columns(scheme, "x", x, places, ends, block)
            else:
                ends = offsets
                a = _quantize_rows(scheme, "wgrad", "g", grad, offsets)
                b = _quantize_rows(scheme, "wgrad", "x", x, offsets)
            grad_weight = outer_products(a.values, b.values, ends, a.scale * b.scale)
        return grad_x, grad_weight, None, None


def _source(scheme: Scheme, product: str, kind: Kind) -> str:
    """Return the product that an operand is rounded for: of x and w in a bf16 backward product, the forward one."""
    plain = getattr(scheme.products, product) not in QUANTIZED
    return "fprop" if plain and kind != "g" else product


def _quantize(scheme: Scheme, product: str, kind: Kind, x: Tensor, axis: int) -> Operand:
    """Quantise a whole operand [R, K] along an axis, -1 or -2, or the weights [E, O, I] of experts, each by itself.

    As the forward product left it, it comes with the shape it has.
    """
    source = _source(scheme, product, kind)
    axis = axis if source == product else -1
    padded = _pad(x, axis, _BLOCKS.get(getattr(scheme.products, source), 1))
    operand = _round(scheme, product, kind, padded, axis, None)
    return operand if source == product else operand._replace(values=operand.values[..., : x.shape[-1]])


def _quantize_rows(scheme: Scheme, product: str, kind: Kind, x: Tensor, offsets: Tensor) -> Operand:
    """Quantise rows [R, K] sorted by expert along K, likewise; the scale is [E]."""
    source = _source(scheme, product, kind)
    chosen = getattr(scheme.products, source)
    padded = _pad(x, -1, _BLOCKS.get(chosen, 1))
    if chosen in ("nvfp4", "fp8"):
        experts = row_experts(len(x), offsets)
        amax = _expert_amax(tensor_amax(padded, stacked=True), experts, len(offsets))
        values = _round(scheme, product, kind, padded, -1, amax[experts]).values
        scale = _tensor_scale(chosen, kind, amax[:-1])
    else:
        values = _round(scheme, product, kind, padded, -1, None).values
        scale = torch.ones(len(offsets), device=x.device)
    return Operand(values if source == product else values[:, : x.shape[-1]], scale)


def _quantize_columns(scheme: Scheme, kind: Kind, x: Tensor, places: Tensor, ends: Tensor, block: int) -> Operand:
    """Quantise rows [R, F] along the rows of each expert, filled up to blocks of `block` rows; the scale is [E].

    Every block is an entry of its own to the quantiser, with the largest magnitude of its expert's rows.
    """
    chosen, count = scheme.products.wgrad, -(-(len(x) + len(ends) * (block - 1)) // block)
    blocks = x.new_zeros(count * block, x.shape[1]).index_copy_(0, places, x).unflatten(0, (count, block))
    experts = row_experts(count, ends // block)
    hadamard = chosen == "nvfp4" and scheme.arithmetic.hadamard
    amax = _expert_amax(nvfp4.largest_magnitude(blocks, -2, hadamard, stacked=True), experts, len(ends))
    operand = _round(scheme, "wgrad", kind, blocks, -2, amax[experts])
    return Operand(operand.values.flatten(0, 1), _tensor_scale(chosen, kind, amax[:-1]))


def _round(scheme: Scheme, product: str, kind: Kind, x: Tensor, axis: int, amax: Tensor | None) -> Operand:
    """Round an operand in the format of its product, and show it to the observer.

    Args:
        scheme: of the module.
        product: fprop, dgrad or wgrad.
        kind: which tensor.
        x: bf16 [..., R, K], whole blocks along the axis.
        axis: of the sum, -1 or -2.
        amax: fp32, largest magnitudes of leading indices (rotated); None: of the tensor, or of each expert of a stack.
    """
    source, stacked = _source(scheme, product, kind), x.ndim == 3 and amax is None
    arithmetic, chosen = scheme.arithmetic, getattr(scheme.products, source)
    hadamard = chosen == "nvfp4" and source == "wgrad" and arithmetic.hadamard
    bound = None
    if chosen == "nvfp4":
        stochastic = kind == "g" and arithmetic.stochastic_rounding
        options = nvfp4.Options(
            amax=amax,
            tiles=kind == "w" and arithmetic.two_dimensional_weights,
            rounding="stochastic" if stochastic else "nearest",
            generator=arithmetic.generator(x.device) if stochastic else None,
            stacked=stacked,
            axis=axis,
            hadamard=hadamard,
        )
        values, scale, bound = nvfp4.gemm_operand(x, options, arithmetic.observer is not None)
        operand = Operand(values, scale)
    elif chosen == "mxfp8":
        operand = Operand(mxfp8.quantize_dequantize(x, axis=axis), _one(x))
    elif chosen == "fp8":
        inverse_scale = fp8.inverse_scale_of(tensor_amax(x, stacked) if amax is None else amax, _FP8[kind])
        operand = Operand(*fp8.gemm_operand(x, inverse_scale, _FP8[kind]))
    else:
        return Operand(x, _one(x))
    if arithmetic.observer is not None:
        before = rotate(x, axis) if hadamard else x
        scale = broadcast_scale(operand.scale, x.ndim)  # has axes: bf16 times it is fp32
        if bound is None:  # MXFP8 clips nothing: its scales are rounded up
            bound = scale * (fp8.clipping_bound(_FP8[kind]) if chosen == "fp8" else math.inf)
        arithmetic.observer(scheme, f"{product}.{kind}", before, operand.values * scale, bound)
    return operand


def _tensor_scale(chosen: Format, kind: Kind, amax: Tensor) -> Tensor:
    """Return what the values of an operand with this fp32 largest magnitude are multiplied by."""
    if chosen == "nvfp4":
        return nvfp4.inverse_scale_of(amax).reciprocal()
    return fp8.inverse_scale_of(amax, _FP8[kind]).reciprocal() if chosen == "fp8" else torch.ones_like(amax)


def _one(x: Tensor) -> Tensor:
    return torch.ones((), device=x.device)


def _expert_amax(amax: Tensor, experts: Tensor, count: int) -> Tensor:
    """Return fp32 [E + 1], the largest of the rows [R] of each expert; the last is of rows of none."""
    return amax.new_zeros(count + 1).scatter_reduce_(0, experts, amax, "amax")


def _pad(x: Tensor, axis: int, multiple: int) -> Tensor:
    """Fill an axis, -1 or -2, with zeros up to a multiple."""
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    return F.pad(x, (0, missing) if axis == -1 else (0, 0, 0, missing))
