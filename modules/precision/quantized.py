"""The weight of a linear layer as a quantised checkpoint holds it: codes, scales, and the scale of the layer's inputs.

Files store the fp32 scale of a tensor either as a factor (Model Optimizer) or as its reciprocal (compressed-tensors),
and readers multiply in different orders. The scales chosen here have 20 significant bits and a reciprocal that rounds
back to them: then block scale times scale is exact in fp32, dividing by the reciprocal gives the same, and all orders
of `code x block scale x scale` round to one number, bit for bit. That moves a scale by some 1e-6 of itself,
rarely by up to 3e-4.
Shapes: O out-features, I in-features.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from modules.ops.native.quantization import BLOCK, E4M3_MAX, FOUR_OVER_SIX_MAX, Options
from modules.precision import e2m1, fp8, nvfp4
from modules.precision.formats import tensor_amax

WeightFormat = Literal["nvfp4", "fp8"]
ScaleSearch = Literal["max", "mse", "four_over_six"]
"""How the block scales of NVFP4 weights are found: of the block's maximum, with the smallest squared error of all E4M3
numbers, or the better of mapping the maximum onto 6 or onto 4."""

_DROPPED_BITS = 4
"""Of the 24 bits of an fp32 significand: as many as the significand of a block scale has."""
_LEAST = 2.0**-117
"""Smallest scale: its product with the smallest block scale, 2^-9, is a normal number still, and has a reciprocal."""


class QuantizedWeight(NamedTuple):
    """A quantised weight [O, I]: codes times block scales times `scale`."""

    format: WeightFormat
    """nvfp4 (blocks of 16 along I), or fp8 (E4M3, one scale)."""
    codes: Tensor
    """uint8 [O, I/2], two E2M1 codes a byte, the first in the low half; or float8_e4m3fn [O, I]."""
    block_scales: Tensor | None
    """float8_e4m3fn [O, I/16]; None in FP8."""
    scale: Tensor
    """fp32 scalar (`weight_scale_2` of Model Optimizer in NVFP4, `weight_scale` in FP8)."""
    input_scale: Tensor | None
    """fp32 scalar: largest magnitude of the inputs over 2688 (NVFP4) or 448 (FP8), which they are quantised with; None:
    inputs are not quantised."""


def tensor_scale(amax: Tensor, format: WeightFormat, four_over_six: bool = False) -> Tensor:
    """Return the scale for a largest magnitude: at least the exact quotient, so that nothing saturates; 1 for 0.

    Args:
        amax: fp32, of weights or inputs, any shape.
        format: of the codes.
        four_over_six: whether scales are chosen for it, which leaves block scales up to 256.
    """
    largest = E4M3_MAX if format == "fp8" else e2m1.MAX * (FOUR_OVER_SIX_MAX if four_over_six else E4M3_MAX)
    step = 1 << _DROPPED_BITS
    quotient = (amax.float() / largest).clamp(min=_LEAST)
    bits = torch.where(amax > 0, quotient, 1.0).view(torch.int32)
    bits = (bits + step - 1) & -step
    while not (settled := _has_exact_reciprocal(bits.view(torch.float32))).all():
        bits = torch.where(settled, bits, bits + step)
    return bits.view(torch.float32)


def _has_exact_reciprocal(scale: Tensor) -> Tensor:
    """Return whether dividing by the fp32 reciprocal gives the very products that multiplying gives."""
    error = scale.double() * scale.reciprocal().double() - 1
    return error.abs() < 2**-25


@torch.no_grad()
def quantize_weight(
    weight: Tensor,
    format: WeightFormat,
    *,
    amax: Tensor | None = None,
    input_scale: Tensor | None = None,
    search: ScaleSearch = "max",
) -> QuantizedWeight:
    """Quantise the weight of a linear layer.

    Args:
        weight: [O, I] of any floating dtype, I divisible by 16 in NVFP4.
        format: nvfp4 or fp8.
        amax: fp32 scalar that the scale is made for, e.g. that of all projections an engine fuses; None: of `weight`.
        input_scale: see `QuantizedWeight`.
        search: of the block scales in NVFP4.

    Raises:
        UserError: if I is not divisible by 16 in NVFP4.
    """
    four_over_six = format == "nvfp4" and search == "four_over_six"
    scale = tensor_scale(tensor_amax(weight) if amax is None else amax.float(), format, four_over_six)
    inverse_scale = scale.reciprocal()
    if format == "fp8":
        return QuantizedWeight(format, fp8.quantize(weight, inverse_scale), None, scale, input_scale)
    scales = nvfp4.mse_scales(weight, Options(inverse_scale=inverse_scale)) if search == "mse" else None
    options = Options(inverse_scale=inverse_scale, scales=scales, four_over_six="mse" if four_over_six else None)
    codes, scales, _ = nvfp4.quantize(weight, options)
    return QuantizedWeight(format, e2m1.pack(codes), scales, scale, input_scale)


def gemm_values(weight: QuantizedWeight) -> Tensor:
    """Return bf16 [O, I], codes times block scales: exact, six significant bits at most; `scale` is left out."""
    if weight.block_scales is None:
        return weight.codes.bfloat16()
    every_byte = torch.arange(256, dtype=torch.uint8, device=weight.codes.device).unsqueeze(1)
    pairs = e2m1.decode(e2m1.unpack(every_byte)).bfloat16()
    numbers = pairs[weight.codes.int()].flatten(-2).unflatten(-1, (-1, BLOCK))
    return numbers.mul_(weight.block_scales.bfloat16().unsqueeze(-1)).flatten(-2)
