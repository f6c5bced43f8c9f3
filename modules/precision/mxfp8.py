"""MXFP8: E4M3 numbers with one power-of-two scale (E8M0) for every 32 along an axis (OCP Microscaling 1.0).

The scale is the smallest power of two, 2^-127 to 2^127, that keeps the block's largest magnitude within 448: the
exponent is rounded up, as the hardware's `cvt.rp.ue8m0` and Transformer Engine do, so nothing finite saturates. A block
of zeros has scale 2^-127 and stays zero. An infinity makes the scale 2^127: it becomes 448 times that, an infinity in
fp32, and the rest of its block next to nothing. A NaN makes the scale, and with it its block, NaN.

On a CPU `modules/ops/native/quantization.c` does the work of `quantize_dequantize` where it can be compiled, with the
same bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from modules.ops.native import quantization as native
from modules.precision.formats import check_blocks

BLOCK = 32
E4M3_MAX = 448.0
E8M0_BIAS = 127


class MXFP8(NamedTuple):
    """A quantised tensor: each code times its block's scale."""

    codes: Tensor
    """float8_e4m3fn [..., K]."""
    scales: Tensor
    """float8_e8m0fnu [..., K/32]."""


def block_scales(amax: Tensor) -> Tensor:
    """Return the E8M0 scales of fp32 block maxima."""
    mantissa, exponent = torch.frexp(amax / E4M3_MAX)  # mantissa in [0.5, 1): the power itself where it is 0.5
    biased = (exponent - (mantissa == 0.5).int() + E8M0_BIAS).clamp(0, 254)
    biased = torch.where(amax == 0, 0, torch.where(amax.isinf(), 254, torch.where(amax.isnan(), 255, biased)))
    return biased.to(torch.uint8).view(torch.float8_e8m0fnu)


@torch.no_grad()
def quantize(x: Tensor) -> MXFP8:
    """Quantise a tensor of any floating dtype along its last axis, rounding to the nearest (ties to even).

    Args:
        x: [..., K].

    Raises:
        UserError: if K is not divisible by 32.
    """
    check_blocks(x.shape[-1], BLOCK, "MXFP8")
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    scales = block_scales(blocks.abs().amax(-1))
    values = (blocks / scales.float().unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX)
    return MXFP8(values.flatten(-2).to(torch.float8_e4m3fn), scales)


def dequantize(quantized: MXFP8, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the numbers [..., K] of a quantised tensor."""
    blocks = quantized.codes.float().unflatten(-1, (-1, BLOCK))
    return (blocks * quantized.scales.float().unsqueeze(-1)).flatten(-2).to(dtype)


@torch.no_grad()
def quantize_dequantize(x: Tensor, *, axis: int = -1) -> Tensor:
    """Return what is left of `x` after `quantize` along an axis (-1 or -2), in the dtype of `x`."""
    check_blocks(x.shape[axis], BLOCK, "MXFP8")
    if native.applies(x):
        return native.mxfp8(x, axis)
    turned = x.transpose(axis, -1)
    return dequantize(quantize(turned), x.dtype).transpose(axis, -1)
