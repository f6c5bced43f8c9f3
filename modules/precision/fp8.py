"""FP8 with one fp32 scale a tensor: E4M3 (largest 448), or E5M2 (57344) for gradients.

The scale maps the largest magnitude onto the format's largest number. A tensor of zeros, or one that holds an
infinity, has scale 1 (as in Transformer Engine); infinities and numbers beyond a frozen `amax` saturate. A NaN stays
NaN, and where `amax` is taken from the tensor all of the tensor becomes NaN with it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from modules.ops.native import quantization as native
from modules.precision.scaling import broadcast_scale, tensor_amax

FLOAT32_MAX = torch.finfo(torch.float32).max


class FP8(NamedTuple):
    """A quantised tensor: `codes / encode_scale`."""

    codes: Tensor
    """float8_e4m3fn or float8_e5m2, shape of the tensor."""
    encode_scale: Tensor
    """fp32 scalar, or one per leading index."""


def encode_scale(amax: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """Return the fp32 factor that maps `amax` onto the largest number of `dtype`; 1 for 0 and infinity."""
    scale = (torch.full_like(amax, torch.finfo(dtype).max) / amax).clamp(max=FLOAT32_MAX)
    return torch.where((amax == 0) | amax.isinf(), torch.ones_like(scale), scale)


def clipping_bound(dtype: torch.dtype) -> float:
    """Return the scaled magnitude beyond which a number is clipped, not just rounded: E4M3 464, E5M2 61440."""
    limits = torch.finfo(dtype)
    return limits.max + 2.0 ** math.floor(math.log2(limits.max)) * limits.eps / 2


@torch.no_grad()
def quantize(
    x: Tensor,
    *,
    amax: Tensor | None = None,
    encode: Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    stacked: bool = False,
) -> FP8:
    """Quantise a tensor of any floating dtype, rounding to the nearest (ties to even).

    Args:
        x: [...].
        amax: fp32 largest magnitude, a scalar or one per leading index; None: that of `x`.
        encode: fp32 scale itself instead of that of `amax`, a scalar or one per leading index.
        dtype: float8_e4m3fn or float8_e5m2.
        stacked: without `amax`, take one per leading index ([E, O, I]: per expert).
    """
    scale = _scale_of(x, amax, encode, dtype, stacked)
    largest = torch.finfo(dtype).max
    return FP8((x.float() * broadcast_scale(scale, x.ndim)).clamp(-largest, largest).to(dtype), scale)


def dequantize(quantized: FP8, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the numbers of a quantised tensor."""
    return (quantized.codes.float() / broadcast_scale(quantized.encode_scale, quantized.codes.ndim)).to(dtype)


@torch.no_grad()
def quantize_dequantize(
    x: Tensor,
    *,
    amax: Tensor | None = None,
    encode: Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    stacked: bool = False,
) -> Tensor:
    """Return what is left of `x` after `quantize`, in the dtype of `x`."""
    if native.applies(x):
        return native.fp8(x, _scale_of(x, amax, encode, dtype, stacked), dtype)
    return dequantize(quantize(x, amax=amax, encode=encode, dtype=dtype, stacked=stacked), x.dtype)


@torch.no_grad()
def gemm_operand(
    x: Tensor,
    *,
    amax: Tensor | None = None,
    encode: Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    stacked: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (bf16 values of the codes, exact; fp32 scale): what a matrix product takes, and multiplies after."""
    if native.applies(x):
        encode = _scale_of(x, amax, encode, dtype, stacked)
        return native.fp8(x, encode, dtype, unscaled=True), encode.reciprocal()
    codes, encode = quantize(x, amax=amax, encode=encode, dtype=dtype, stacked=stacked)
    return codes.bfloat16(), encode.reciprocal()


def _scale_of(x: Tensor, amax: Tensor | None, encode: Tensor | None, dtype: torch.dtype, stacked: bool) -> Tensor:
    if encode is not None:
        return encode
    return encode_scale(tensor_amax(x, stacked) if amax is None else amax.float(), dtype)
