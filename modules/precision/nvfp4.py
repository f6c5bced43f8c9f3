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
from typing import Literal, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from modules.ops.native import quantization as native
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
from modules.precision.hadamard import rotate
from modules.precision.scaling import broadcast_scale, check_blocks, tensor_amax

CLIPPED = 7.0
"""Magnitudes beyond this, at the scale of their block, are clipped and not just rounded: 6 and half the step before it.

A scale that was rounded down takes the block's largest magnitude to 6.4 at most; one below 2^-6, where E4M3 numbers are
far apart, to 9.
"""
FOUR_OVER_SIX_MAX = 256.0
"""Largest block scale that S is made for with four-over-six: 1.5 times it is still an E4M3 number."""


class NVFP4(NamedTuple):
    """A quantised tensor."""

    codes: Tensor
    """uint8 [..., K], E2M1 codes 0 to 15; `e2m1.pack` stores two in a byte."""
    scales: Tensor
    """float8_e4m3fn [..., K/16]. The scale of a 16x16 tile stands in each of its rows, as matrix products want it."""
    encode_scale: Tensor
    """S: fp32 scalar, or of the shape of leading axes. Checkpoints store S (compressed-tensors) or 1/S (Model
    Optimizer)."""


class Options(TypedDict, total=False):
    """How to quantise; every key may be left out."""

    amax: Tensor | None
    """fp32 largest magnitude (of the rotated tensor with `hadamard`): a scalar, or of the shape of leading axes of the
    tensor (per expert, per row). None: taken from the tensor."""
    encode: Tensor | None
    """fp32 S itself instead of that of `amax`, of a shape that `amax` may have."""
    stacked: bool
    """Without `amax`, take one for each leading index ([E, O, I]: per expert)."""
    tiles: bool
    """One scale for each 16x16 tile of the last two axes instead of each 16 numbers; rows that fill no whole tile make
    a smaller one. Then quantising and transposing may be exchanged."""
    rounding: Literal["nearest", "stochastic"]
    """To the nearest (ties to even), the default, or unbiased with random bits of `generator`."""
    generator: torch.Generator | None
    """On the device of the tensor; None: torch's global one."""
    four_over_six: Literal["mse", "mae"] | None
    """Map a block's (tile's) largest magnitude onto 4 instead of 6 where that makes the sum of squared, or absolute,
    errors smaller."""
    scales: Tensor | None
    """float8_e4m3fn [..., K/16] to take instead of those of the maxima."""
    axis: int
    """Along which blocks lie: -1 (K), the default, or -2 (R), as in the transposed tensor. `quantize` then returns the
    transposed tensor; values are laid out as the tensor is, either way."""
    hadamard: bool
    """Rotate every 16 numbers along the axis first (`hadamard.rotate`); they stay rotated."""


def encode_scale(amax: Tensor, bound: float = E4M3_MAX) -> Tensor:
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


class _Request:
    """A tensor with its options, S found and random bits drawn: what both ways of rounding start from."""

    def __init__(
        self,
        x: Tensor,
        *,
        amax: Tensor | None = None,
        encode: Tensor | None = None,
        stacked: bool = False,
        tiles: bool = False,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        generator: torch.Generator | None = None,
        four_over_six: Literal["mse", "mae"] | None = None,
        scales: Tensor | None = None,
        axis: int = -1,
        hadamard: bool = False,
    ) -> None:
        check_blocks(x.shape[axis], BLOCK, "NVFP4")
        self.x, self.axis, self.tiles, self.hadamard = x, axis, tiles, hadamard
        self.four_over_six: Literal["mse", "mae"] | None = four_over_six
        self.scales = scales
        self.native = native.applies(x)
        self.bits = random_bits(x, generator) if rounding == "stochastic" else None
        self.bound = FOUR_OVER_SIX_MAX if four_over_six else E4M3_MAX
        if encode is not None:
            self.amax = e2m1.MAX * self.bound / encode
        elif amax is not None:
            self.amax = amax.detach().float()
        else:
            self.amax = largest_magnitude(x, axis, hadamard, stacked)
        self.encode = encode_scale(self.amax, self.bound) if encode is None else encode.float()

    def run_native(
        self,
        kind: torch.dtype | None,
        choice: native.Choice | None = None,
        unscaled: bool = False,
        keep_scales: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return what `native.quantize` does."""
        given = None if self.scales is None else self.scales.float()
        return native.quantize(
            self.x,
            self.encode,
            self.amax,
            kind=kind,
            choice=choice or ("given" if given is not None else self.four_over_six or "maximum"),
            bound=self.bound,
            axis=self.axis,
            hadamard=self.hadamard,
            tiles=self.tiles,
            bits=self.bits,
            given=given,
            unscaled=unscaled,
            keep_scales=keep_scales,
        )

    def run_portable(self) -> tuple[Tensor, Tensor]:
        """Return (E2M1 numbers [..., R, K/16, 16], scales [..., R, K/16]), transposed where the axis is -2."""
        turned = (rotate(self.x, self.axis) if self.hadamard else self.x).transpose(self.axis, -1)
        blocks = turned.float().unflatten(-1, (-1, BLOCK))
        encode = broadcast_scale(self.encode, blocks.ndim - 1)
        bits = None if self.bits is None else self.bits.transpose(self.axis, -1).unflatten(-1, (-1, BLOCK))
        if self.scales is not None:
            return round_blocks(blocks, self.scales, encode, bits), self.scales
        if self.four_over_six is not None:
            amax = broadcast_scale(self.amax, blocks.ndim - 1)
            return four_over_six(blocks, encode, amax, self.bound, self.tiles, bits, self.four_over_six)
        scales = block_scales(maxima(blocks, self.tiles) * (encode * (1 / 6)))
        return round_blocks(blocks, scales, encode, bits), scales


@torch.no_grad()
def quantize(x: Tensor, **options: Unpack[Options]) -> NVFP4:
    """Quantise a tensor of any floating dtype.

    Args:
        x: [..., K].
        options: see `Options`.

    Raises:
        UserError: if the axis of the blocks is not divisible by 16.
    """
    request = _Request(x, **options)
    if request.native:
        codes, scales = request.run_native(kind=torch.uint8, keep_scales=True)
        assert codes is not None
        assert scales is not None
        return NVFP4(codes.transpose(request.axis, -1), scales.to(torch.float8_e4m3fn), request.encode)
    values, scales = request.run_portable()
    return NVFP4(e2m1.encode(values).flatten(-2), scales, request.encode)


@torch.no_grad()
def dequantize(quantized: NVFP4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the numbers [..., K] of a quantised tensor."""
    values = e2m1.decode(quantized.codes).unflatten(-1, (-1, BLOCK))
    scales = quantized.scales.float() / broadcast_scale(quantized.encode_scale, quantized.scales.ndim)
    return (values * scales.unsqueeze(-1)).flatten(-2).to(dtype)


@torch.no_grad()
def quantize_dequantize(x: Tensor, **options: Unpack[Options]) -> Tensor:
    """Return what is left of `x` after `quantize`, in the dtype of `x`.

    Args:
        x: [..., R, K].
        options: see `Options`.

    Raises:
        UserError: if the axis of the blocks is not divisible by 16.
    """
    request = _Request(x, **options)
    if request.native:
        out, _ = request.run_native(kind=x.dtype)
        assert out is not None
        return out
    values, scales = request.run_portable()
    factors = scales.float() / broadcast_scale(request.encode, scales.ndim)
    return (values * factors.unsqueeze(-1)).flatten(-2).to(x.dtype).transpose(request.axis, -1)


@torch.no_grad()
def gemm_operand(x: Tensor, **options: Unpack[Options]) -> tuple[Tensor, Tensor]:
    """Return (values, 1/S) as a matrix product takes them: numbers times block scales, and what it multiplies after.

    The values have six significant bits at most, so bf16 holds them exactly, and a bf16 product with fp32 sums adds up
    the very terms that the hardware does. What is left of `x` is `values / S`.

    Args:
        x: [..., R, K].
        options: see `Options`.

    Returns:
        bf16 like `x`, and fp32: a scalar, or of the shape of leading axes.

    Raises:
        UserError: if the axis of the blocks is not divisible by 16.
    """
    values, _, scale = _gemm_operand(_Request(x, **options), keep_scales=False)
    return values, scale


@torch.no_grad()
def gemm_operand_and_bound(x: Tensor, **options: Unpack[Options]) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `gemm_operand` does, and the magnitude beyond which a number of `x` is clipped, not just rounded.

    Args:
        x: [..., R, K].
        options: see `Options`.

    Returns:
        bf16 like `x`; fp32: a scalar, or of the shape of leading axes; fp32 like `x`: `CLIPPED` at the scale of each
        number's block, infinity where that is 0 (nothing is left there).

    Raises:
        UserError: if the axis of the blocks is not divisible by 16.
    """
    request = _Request(x, **options)
    values, scales, scale = _gemm_operand(request, keep_scales=True)
    assert scales is not None
    bound = torch.where(scales == 0, math.inf, scales * (CLIPPED * broadcast_scale(scale, scales.ndim)))
    return values, scale, bound.repeat_interleave(BLOCK, -1).transpose(request.axis, -1)


def _gemm_operand(request: _Request, keep_scales: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return (values, fp32 block scales [..., R, K/16], transposed where the axis is -2, or None; 1/S)."""
    decode = request.encode.reciprocal()
    if request.native:
        out, scales = request.run_native(kind=torch.bfloat16, unscaled=True, keep_scales=keep_scales)
        assert out is not None
        return out, scales, decode
    values, scales = request.run_portable()
    products = (values * scales.float().unsqueeze(-1)).flatten(-2).bfloat16()
    return products.transpose(request.axis, -1), scales.float(), decode


@torch.no_grad()
def mse_scales(x: Tensor, *, amax: Tensor | None = None, encode: Tensor | None = None, stacked: bool = False) -> Tensor:
    """Search the block scales with the smallest squared errors among all positive E4M3 numbers.

    A block keeps the scale of its maximum unless another is better; of equals, the smallest.

    Args:
        x: [..., K].
        amax: see `Options`.
        encode: see `Options`.
        stacked: see `Options`.

    Returns:
        float8_e4m3fn [..., K/16], for `quantize(..., scales=)` with the same `amax` or `encode`.

    Raises:
        UserError: if K is not divisible by 16.
    """
    request = _Request(x, amax=amax, encode=encode, stacked=stacked)
    if request.native:
        _, scales = request.run_native(kind=None, choice="search", keep_scales=True)
        assert scales is not None
        return scales.to(torch.float8_e4m3fn)
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    return search_scales(blocks, broadcast_scale(request.encode, blocks.ndim - 1))
