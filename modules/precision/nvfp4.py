"""NVFP4: E2M1 numbers, an E4M3 scale for every 16 of them, one fp32 scale a tensor.

The arithmetic is that of Transformer Engine, which is the hardware's, in fp32 and with a guard for zeros:

    S   = min(6 bound / amax, FLT_MAX), 1 where amax is 0 or S is 0          bound = 448, or 256 with four-over-six
    s_b = E4M3(min(amax_b (S / 6), 448))                                     amax_b: of the block
    q   = E2M1(clamp(x min(1 / (s_b (1 / S)), FLT_MAX), -6, 6))
    x'  = q (s_b / S)

What is not a number, or too large to be one:
- a NaN makes its block's scale, and so the block, NaN; with `amax` taken from the tensor, all of the tensor;
- an infinity makes S = 1 where `amax` is taken from the tensor and saturates: it becomes +-2688 (6 times 448) and the
  rest of its block is divided by 448. A frozen `amax` saturates everything beyond itself in the same way. So a
  quantiser is no place to find infinities: look before it.
- blocks of zeros, and blocks so small beside `amax` that their scale rounds to 0, become zeros (the codes of a block
  with scale 0 say nothing); a tensor of zeros becomes zeros with S = 1. Subnormal numbers are numbers like others.

On a CPU `modules/ops/native/quantization.c` does the work where it can be compiled, elsewhere `blocks.py`, bit for
bit the same. Nothing here has a gradient: straight-through estimation is its callers' business.
Shapes: [..., R, K], blocks of 16 along K. E: experts of a stack [E, O, I].
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from modules.ops.native import quantization as native
from modules.ops.native.quantization import Options
from modules.precision import e2m1
from modules.precision.blocks import (
    BLOCK,
    E4M3_MAX,
    FLOAT32_MAX,
    block_scales,
    four_over_six,
    maxima,
    round_blocks,
    search_scales,
)
from modules.precision.formats import broadcast_scale, check_blocks, tensor_amax
from modules.precision.hadamard import rotate

CLIPPED = 7.0
"""Magnitudes beyond this, at the scale of their block, are clipped and not just rounded: 6 and half the step before it.

A scale that was rounded down takes the block's largest magnitude to 6.4 at most; one below 2^-6, where E4M3 numbers are
far apart, to 9.
"""


class NVFP4(NamedTuple):
    """A quantised tensor."""

    codes: Tensor
    """uint8 [..., K], E2M1 codes 0 to 15; `e2m1.pack` stores two in a byte."""
    scales: Tensor
    """float8_e4m3fn [..., K/16]. The scale of a 16x16 tile stands in each of its rows, as matrix products want it."""
    inverse_scale: Tensor
    """S: fp32 scalar, or of the shape of leading axes. Checkpoints store S (compressed-tensors) or 1/S (Model
    Optimizer)."""


def inverse_scale_of(amax: Tensor, bound: float = E4M3_MAX) -> Tensor:
    """Return S for fp32 largest magnitudes."""
    scale = (torch.full_like(amax, e2m1.MAX * bound) / amax).clamp(max=FLOAT32_MAX)
    return torch.where((amax == 0) | (scale == 0), torch.ones_like(scale), scale)


@torch.no_grad()
def largest_magnitude(x: Tensor, axis: int = -1, hadamard: bool = False, stacked: bool = False) -> Tensor:
    """Return the fp32 amax that `Options` speak of: of a tensor [..., R, K], or one for each leading index."""
    if native.applies(x) and (x.ndim > 2 or not stacked):
        return native.amax(x, axis=axis, hadamard=hadamard, stacked=stacked)
    return tensor_amax(rotate(x, axis) if hadamard else x, stacked)


def random_bits(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw a uniform uint8 for every element of `x`: eight from each 64-bit number of the generator."""
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.uint8)[: x.numel()].view(x.shape)


_DEFAULT = Options()


class _Request:
    """A tensor with its options, S found and random bits drawn: what both ways of rounding start from."""

    def __init__(self, x: Tensor, options: Options) -> None:
        check_blocks(x.shape[options.axis], BLOCK, "NVFP4")
        self.x, self.options, self.native = x, options, native.applies(x)
        self.bits = random_bits(x, options.generator) if options.rounding == "stochastic" else None
        if options.inverse_scale is not None:
            self.inverse_scale = options.inverse_scale.float()
            self.amax = e2m1.MAX * options.bound / options.inverse_scale
        else:
            self.amax = (
                largest_magnitude(x, options.axis, options.hadamard, options.stacked)
                if options.amax is None
                else options.amax.detach().float()
            )
            self.inverse_scale = inverse_scale_of(self.amax, options.bound)
        self.given = x, options, self.inverse_scale, self.amax, self.bits
        """What `native.quantize` takes first."""

    def run_portable(self) -> tuple[Tensor, Tensor]:
        """Return (E2M1 numbers [..., R, K/16, 16], scales [..., R, K/16]), transposed where the axis is -2."""
        options = self.options
        turned = (rotate(self.x, options.axis) if options.hadamard else self.x).transpose(options.axis, -1)
        blocks = turned.float().unflatten(-1, (-1, BLOCK))
        inverse_scale = broadcast_scale(self.inverse_scale, blocks.ndim - 1)
        bits = None if self.bits is None else self.bits.transpose(options.axis, -1).unflatten(-1, (-1, BLOCK))
        if options.scales is not None:
            return round_blocks(blocks, options.scales, inverse_scale, bits), options.scales
        if options.four_over_six is not None:
            amax = broadcast_scale(self.amax, blocks.ndim - 1)
            bound, kind = options.bound, options.four_over_six
            return four_over_six(blocks, inverse_scale, amax, bound, options.tiles, bits, kind)
        scales = block_scales(maxima(blocks, options.tiles) * (inverse_scale * (1 / 6)))
        return round_blocks(blocks, scales, inverse_scale, bits), scales


@torch.no_grad()
def quantize(x: Tensor, options: Options = _DEFAULT) -> NVFP4:
    """Quantise a tensor of any floating dtype.

    Args:
        x: [..., K].
        options: see `Options`.

    Raises:
        UserError: if the axis of the blocks is not divisible by 16.
    """
    request = _Request(x, options)
    if request.native:
        codes, scales = native.quantize(*request.given, kind=torch.uint8, keep_scales=True)
        return NVFP4(codes.transpose(request.options.axis, -1), scales.to(torch.float8_e4m3fn), request.inverse_scale)
    values, scales = request.run_portable()
    return NVFP4(e2m1.encode(values).flatten(-2), scales, request.inverse_scale)


@torch.no_grad()
def quantize_dequantize(x: Tensor, options: Options = _DEFAULT) -> Tensor:
    """Return what is left of `x` after `quantize`, in the dtype of `x`.

    Args:
        x: [..., R, K].
        options: see `Options`.

    Raises:
        UserError: if the axis of the blocks is not divisible by 16.
    """
    request = _Request(x, options)
    if request.native:
        return native.quantize(*request.given, kind=x.dtype)[0]
    values, scales = request.run_portable()
    factors = scales.float() / broadcast_scale(request.inverse_scale, scales.ndim)
    return (values * factors.unsqueeze(-1)).flatten(-2).to(x.dtype).transpose(request.options.axis, -1)


@torch.no_grad()
def gemm_operand(
    x: Tensor, options: Options = _DEFAULT, with_bound: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (values, 1/S, bound): what a matrix product takes (numbers times block scales), and multiplies after.

    The values have six significant bits at most, so bf16 holds them exactly, and a bf16 product with fp32 sums adds up
    the very terms that the hardware does. What is left of `x` is `values / S`.

    Args:
        x: [..., R, K].
        options: see `Options`.
        with_bound: whether to work out the bound.

    Returns:
        bf16 like `x`; fp32: a scalar, or of the shape of leading axes; fp32 like `x` or None: the magnitude beyond
        which a number is clipped, and not just rounded. That is `CLIPPED` at the scale of the number's block, infinity
        where that is 0 (nothing is left there).

    Raises:
        UserError: if the axis of the blocks is not divisible by 16.
    """
    request = _Request(x, options)
    decode = request.inverse_scale.reciprocal()
    if request.native:
        kind = torch.bfloat16
        values, scales = native.quantize(*request.given, kind=kind, unscaled=True, keep_scales=with_bound)
    else:
        numbers, rounded = request.run_portable()
        scales = rounded.float()
        values = (numbers * scales.unsqueeze(-1)).flatten(-2).bfloat16().transpose(options.axis, -1)
    if not with_bound:
        return values, decode, None
    bound = torch.where(scales == 0, math.inf, scales * (CLIPPED * broadcast_scale(decode, scales.ndim)))
    return values, decode, bound.repeat_interleave(BLOCK, -1).transpose(options.axis, -1)


@torch.no_grad()
def mse_scales(x: Tensor, options: Options = _DEFAULT) -> Tensor:
    """Search the block scales with the smallest squared errors among all positive E4M3 numbers.

    A block keeps the scale of its maximum unless another is better; of equals, the smallest.

    Args:
        x: [..., K].
        options: of them those that say what S is.

    Returns:
        float8_e4m3fn [..., K/16], for `quantize` with `scales` and the same S.

    Raises:
        UserError: if K is not divisible by 16.
    """
    request = _Request(x, options)
    if request.native:
        _, scales = native.quantize(*request.given, kind=None, search=True, keep_scales=True)
        return scales.to(torch.float8_e4m3fn)
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    return search_scales(blocks, broadcast_scale(request.inverse_scale, blocks.ndim - 1))
