"""FP8 with one fp32 scale a tensor: E4M3 (largest 448), or E5M2 (57344) for gradients.

S maps the largest magnitude onto the format's largest number. That of a tensor of zeros, or of one that holds an
infinity, is 1 (as in Transformer Engine); infinities and numbers beyond the magnitude that S was made for saturate. A
NaN stays NaN, and where S is made for the tensor itself all of the tensor becomes NaN with it.
"""

import math

import torch
from torch import Tensor

from modules.ops.native import quantization as native
from modules.precision.formats import broadcast_scale

FLOAT32_MAX = torch.finfo(torch.float32).max


def inverse_scale_of(amax: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """Return S, the fp32 factor that maps `amax` onto the largest number of `dtype`; 1 for 0 and infinity."""
    scale = (torch.full_like(amax, torch.finfo(dtype).max) / amax).clamp(max=FLOAT32_MAX)
    return torch.where((amax == 0) | amax.isinf(), torch.ones_like(scale), scale)


def clipping_bound(dtype: torch.dtype) -> float:
    """Return the scaled magnitude beyond which a number is clipped, not just rounded: E4M3 464, E5M2 61440."""
    limits = torch.finfo(dtype)
    return limits.max + 2.0 ** math.floor(math.log2(limits.max)) * limits.eps / 2


@torch.no_grad()
def quantize(x: Tensor, inverse_scale: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """Return the codes of a tensor of any floating dtype, rounding to the nearest (ties to even).

    Args:
        x: [...].
        inverse_scale: fp32 S, a scalar or one per leading index.
        dtype: float8_e4m3fn or float8_e5m2.
    """
    largest = torch.finfo(dtype).max
    scaled = x.float() * broadcast_scale(inverse_scale, x.ndim)
    return scaled.clamp(-largest, largest).to(dtype)


@torch.no_grad()
def quantize_dequantize(x: Tensor, inverse_scale: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """Return what is left of `x` after `quantize`, in the dtype of `x`."""
    if native.applies(x):
        return native.fp8(x, inverse_scale, dtype)
    return (quantize(x, inverse_scale, dtype).float() / broadcast_scale(inverse_scale, x.ndim)).to(x.dtype)


@torch.no_grad()
def gemm_operand(x: Tensor, inverse_scale: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """Return (bf16 values of the codes, exact; fp32 1/S): what a matrix product takes, and multiplies after."""
    if native.applies(x):
        return native.fp8(x, inverse_scale, dtype, unscaled=True), inverse_scale.reciprocal()
    return quantize(x, inverse_scale, dtype).bfloat16(), inverse_scale.reciprocal()
