"""NVFP4: E2M1 numbers, an E4M3 scale for every 16 of them, one fp32 scale a tensor.

The arithmetic is that of Transformer Engine, which is the hardware's, in fp32 and with a guard for zeros:

    S   = min(6 bound / amax, FLT_MAX), 1 where amax is 0 or S is 0          bound = 448, or 256 with four-over-six
    s_b = E4M3(min(amax_b (S / 6), 448))                                     amax_b: of the block
    q   = E2M1(clamp(x min(1 / (s_b (1 / S)), FLT_MAX), -6, 6))
    x'  = q (s_b / S)

What is not a number, or too large to be one:
- a NaN makes its block's scale, and so the block, NaN; with `amax` taken from the tensor, all of the tensor;
- an infinity makes S = 1 where `amax` is taken from the tensor and saturates: it becomes +-2688 (6 448), with its whole
  block scaled by 448 and every other block by a scale for S = 1. A frozen `amax` saturates everything beyond itself in
  the same way. The quantiser is therefore no place to find infinities: look before it.
- blocks of zeros, and blocks so small beside `amax` that their scale rounds to 0, become zeros (the codes of a block
  with scale 0 say nothing); a tensor of zeros becomes zeros with S = 1. Subnormal numbers are numbers like others.

Shapes: [..., R, K], blocks of 16 along K. E: experts of a stack [E, O, I].
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from modules.precision import e2m1
from modules.precision.hadamard import rotate
from modules.precision.scaling import broadcast_scale, check_blocks, tensor_amax

BLOCK = 16
E4M3_MAX = 448.0
FOUR_OVER_SIX_MAX = 256.0
"""Largest block scale of four-over-six: 1.5 times it is still an E4M3 number."""
FLOAT32_MAX = torch.finfo(torch.float32).max

Rounding = Literal["nearest", "stochastic"]
FourOverSix = Literal["mse", "mae"]


class NVFP4(NamedTuple):
    """A quantised tensor."""

    codes: Tensor
    """uint8 [..., K], E2M1 codes 0 to 15; `e2m1.pack` stores two in a byte."""
    scales: Tensor
    """float8_e4m3fn [..., K/16]. The scale of a 16x16 tile stands in each of its rows, as matrix products want it."""
    encode_scale: Tensor
    """S: fp32 scalar, or one per leading index. Checkpoints store S (compressed-tensors) or 1/S (Model Optimizer)."""


def encode_scale(amax: Tensor, bound: float = E4M3_MAX) -> Tensor:
    """Return S for fp32 largest magnitudes."""
    scale = (torch.full_like(amax, e2m1.MAX * bound) / amax).clamp(max=FLOAT32_MAX)
    return torch.where((amax == 0) | (scale == 0), torch.ones_like(scale), scale)


def block_scales(amax: Tensor, encode: Tensor, factor: float = 1.0) -> Tensor:
    """Return E4M3 scales for the fp32 maxima of blocks; 0 where a block is too small for one."""
    return (amax * (encode * (1 / 6)) * factor).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)


def random_bits(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw a uniform uint8 for every element of `x`: eight from each 64-bit number of the generator."""
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.uint8)[: x.numel()].view(x.shape)


def quantize(
    x: Tensor,
    *,
    amax: Tensor | None = None,
    tiles: bool = False,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
    four_over_six: FourOverSix | None = None,
    scales: Tensor | None = None,
    stacked: bool = False,
) -> NVFP4:
    """Quantise a tensor of any floating dtype in blocks along its last axis.

    Args:
        x: [..., K].
        amax: fp32 largest magnitude: a scalar, or of the shape of some leading axes (per expert, per row); None: that
            of `x`.
        tiles: one scale for each 16x16 tile of the last two axes instead of each 16 numbers of the last; rows that
            fill no whole tile make a smaller one. Then quantising and transposing may be exchanged.
        rounding: to the nearest (ties to even), or "stochastic": unbiased, with random bits of `generator`.
        generator: on the device of `x`; None: torch's global one.
        four_over_six: map a block's largest magnitude onto 4 instead of 6 where that makes the error of the block (of
            the tile) smaller, by squares or absolute values.
        scales: float8_e4m3fn [..., K/16] to use instead of those of the maxima.
        stacked: without `amax`, take one per leading index ([E, O, I]: per expert).

    Raises:
        ValueError: if K is not divisible by 16.
    """
    check_blocks(x.shape[-1], BLOCK, "NVFP4")
    bits = random_bits(x, generator) if rounding == "stochastic" else None
    encode = _encode_scale(x, amax, four_over_six, stacked)
    values, chosen = _round_blocks(x, encode, tiles, bits, four_over_six, scales)
    return NVFP4(e2m1.encode(values).flatten(-2), chosen, encode)


def dequantize(quantized: NVFP4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the numbers [..., K] of a quantised tensor."""
    values = e2m1.decode(quantized.codes).unflatten(-1, (-1, BLOCK))
    scales = quantized.scales.float() / broadcast_scale(quantized.encode_scale, quantized.scales.ndim)
    return (values * scales.unsqueeze(-1)).flatten(-2).to(dtype)


def quantize_dequantize(
    x: Tensor,
    *,
    amax: Tensor | None = None,
    tiles: bool = False,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
    four_over_six: FourOverSix | None = None,
    scales: Tensor | None = None,
    stacked: bool = False,
    axis: int = -1,
    hadamard: bool = False,
) -> Tensor:
    """Return what is left of `x` after `quantize`, in the dtype of `x`.

    Args:
        x: [..., R, K].
        amax: see `quantize`; with `hadamard`, that of the rotated tensor.
        tiles: see `quantize`.
        rounding: see `quantize`.
        generator: see `quantize`.
        four_over_six: see `quantize`.
        scales: see `quantize`.
        stacked: see `quantize`.
        axis: -1: blocks along K; -2: along R, as the transpose of x would have them along its last axis. The result is
            laid out as `x` either way.
        hadamard: rotate every 16 along the axis first (`hadamard.rotate`); the result stays rotated.
    """
    values, encode = _values(x, amax, tiles, rounding, generator, four_over_six, scales, stacked, axis, hadamard)
    decoded, chosen = values
    factors = chosen.float() / broadcast_scale(encode, chosen.ndim)
    return (decoded * factors.unsqueeze(-1)).flatten(-2).to(x.dtype).transpose(axis, -1)


def gemm_operand(
    x: Tensor,
    *,
    amax: Tensor | None = None,
    tiles: bool = False,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
    four_over_six: FourOverSix | None = None,
    scales: Tensor | None = None,
    stacked: bool = False,
    axis: int = -1,
    hadamard: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (values, 1/S) as a matrix product takes them: bf16 codes times block scales, and what it multiplies after.

    The values have six significant bits at most, so bf16 holds them exactly, and a bf16 product with fp32 sums adds up
    the very terms that the hardware does. `x` is `values / S`.

    Args:
        x: [..., R, K]; see `quantize_dequantize` for this and the rest.
        amax: see there.
        tiles: see there.
        rounding: see there.
        generator: see there.
        four_over_six: see there.
        scales: see there.
        stacked: see there.
        axis: see there.
        hadamard: see there.

    Returns:
        bf16 like `x`, and fp32 of the shape of `amax`.
    """
    values, encode = _values(x, amax, tiles, rounding, generator, four_over_six, scales, stacked, axis, hadamard)
    decoded, chosen = values
    unscaled = (decoded * chosen.float().unsqueeze(-1)).flatten(-2).bfloat16()
    return unscaled.transpose(axis, -1), encode.reciprocal()


def mse_scales(x: Tensor, *, amax: Tensor | None = None, stacked: bool = False) -> Tensor:
    """Search the block scales that make the squared error smallest, among all 126 positive E4M3 numbers.

    A block keeps the scale of its maximum unless another is better, the smallest among equals.

    Args:
        x: [..., K].
        amax: see `quantize`.
        stacked: see `quantize`.

    Returns:
        float8_e4m3fn [..., K/16], for `quantize(..., scales=)` with the same `amax`.
    """
    check_blocks(x.shape[-1], BLOCK, "NVFP4")
    encode = _encode_scale(x, amax, None, stacked)
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    factor = broadcast_scale(encode, blocks.ndim - 1)
    best = block_scales(blocks.abs().amax(-1), factor)
    error = _error(blocks, _scaled(blocks, best, factor, None), best, factor, "mse")
    for byte in range(1, 127):
        candidate = torch.full_like(best, 0).view(torch.uint8).fill_(byte).view(torch.float8_e4m3fn)
        other = _error(blocks, _scaled(blocks, candidate, factor, None), candidate, factor, "mse")
        best = torch.where((other < error), candidate.view(torch.uint8), best.view(torch.uint8)).view(best.dtype)
        error = torch.minimum(error, other)
    return best


def _encode_scale(x: Tensor, amax: Tensor | None, four_over_six: FourOverSix | None, stacked: bool) -> Tensor:
    """Return S of a tensor, or of a given largest magnitude."""
    largest = tensor_amax(x, stacked) if amax is None else amax.float()
    return encode_scale(largest, FOUR_OVER_SIX_MAX if four_over_six else E4M3_MAX)


def _values(
    x: Tensor,
    amax: Tensor | None,
    tiles: bool,
    rounding: Rounding,
    generator: torch.Generator | None,
    four_over_six: FourOverSix | None,
    scales: Tensor | None,
    stacked: bool,
    axis: int,
    hadamard: bool,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return ((E2M1 numbers [..., K/16, 16], scales), S) of the tensor turned so that its blocks lie along the end."""
    check_blocks(x.shape[axis], BLOCK, "NVFP4")
    bits = random_bits(x, generator).transpose(axis, -1) if rounding == "stochastic" else None
    if hadamard:
        x = rotate(x, axis)
    encode = _encode_scale(x, amax, four_over_six, stacked)
    return _round_blocks(x.transpose(axis, -1), encode, tiles, bits, four_over_six, scales), encode


def _round_blocks(
    x: Tensor,
    encode: Tensor,
    tiles: bool,
    bits: Tensor | None,
    four_over_six: FourOverSix | None,
    scales: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the E2M1 numbers fp32 [..., K/16, 16] and the scales float8_e4m3fn [..., K/16]."""
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    factor = broadcast_scale(encode, blocks.ndim - 1)
    if bits is not None:
        bits = bits.unflatten(-1, (-1, BLOCK))
    if scales is not None:
        return _scaled(blocks, scales, factor, bits), scales
    amax = blocks.abs().amax(-1)
    if tiles:
        amax = _over_tiles(amax, "amax")
    six = block_scales(amax, factor)
    values = _scaled(blocks, six, factor, bits)
    if four_over_six is None:
        return values, six
    four = block_scales(amax, factor, 1.5)
    others = _scaled(blocks, four, factor, bits)
    errors = [_error(blocks, *pair, factor, four_over_six) for pair in ((values, six), (others, four))]
    if tiles:
        errors = [_over_tiles(error, "sum") for error in errors]
    better = errors[1] < errors[0]
    chosen = torch.where(better, four.view(torch.uint8), six.view(torch.uint8)).view(torch.float8_e4m3fn)
    return torch.where(better.unsqueeze(-1), others, values), chosen


def _scaled(blocks: Tensor, scales: Tensor, encode: Tensor, bits: Tensor | None) -> Tensor:
    """Return blocks divided by their scales and rounded to E2M1."""
    factor = (scales.float() * encode.reciprocal()).reciprocal().clamp(max=FLOAT32_MAX)
    scaled = (blocks * factor.unsqueeze(-1)).clamp(-e2m1.MAX, e2m1.MAX)
    return e2m1.round_nearest(scaled) if bits is None else e2m1.round_stochastic(scaled, bits)


def _error(blocks: Tensor, values: Tensor, scales: Tensor, encode: Tensor, kind: FourOverSix) -> Tensor:
    """Return the error of each block, summed in an order that the C code shares."""
    difference = values * (scales.float() / encode).unsqueeze(-1) - blocks
    error = difference * difference if kind == "mse" else difference.abs()
    for half in (8, 4, 2, 1):
        error = error[..., :half] + error[..., half:]
    return error.squeeze(-1)


def _over_tiles(rows: Tensor, reduction: Literal["amax", "sum"]) -> Tensor:
    """Reduce [..., R, K/16] over every 16 rows and give each row the result."""
    count = rows.shape[-2]
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -count % BLOCK)).unflatten(-2, (-1, BLOCK))
    if reduction == "amax":
        reduced = padded.amax(-2, keepdim=True)
    else:
        for half in (8, 4, 2, 1):
            padded = padded[..., :half, :] + padded[..., half:, :]
        reduced = padded
    return reduced.expand(*padded.shape[:-2], BLOCK, padded.shape[-1]).flatten(-3, -2)[..., :count, :]
