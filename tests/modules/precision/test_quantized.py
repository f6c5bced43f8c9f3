"""Quantised weights: one number whatever the order of the products, so alike in both layouts of files."""

import pytest
import torch

from modules.precision import e2m1
from modules.precision.quantized import (
    ScaleSearch,
    WeightFormat,
    gemm_values,
    quantize_weight,
    tensor_scale,
)
from tests.modules.helpers import dequantize_weight


@pytest.mark.parametrize("format", ["nvfp4", "fp8"])
def test_scales_lie_just_above_the_quotient_and_survive_their_reciprocal(format: WeightFormat) -> None:
    amax = torch.exp(torch.randn(200_000, generator=torch.Generator().manual_seed(1)) * 8)
    scale = tensor_scale(amax, format)
    quotient = amax / (2688 if format == "nvfp4" else 448)
    assert (scale >= quotient).all()
    excess = scale / quotient - 1
    assert excess.median() < 2e-6
    assert excess.max() < 4e-4
    assert torch.equal(scale.reciprocal().reciprocal(), scale)
    for number in (2.0**-9, 0.5, 3.5 * 2**-6, 240.0, 448.0):  # block scales
        assert torch.equal(number / scale.reciprocal(), number * scale)
    assert tensor_scale(torch.zeros(()), format) == 1


@pytest.mark.parametrize(
    ("format", "search"), [("nvfp4", "max"), ("nvfp4", "mse"), ("nvfp4", "four_over_six"), ("fp8", "max")]
)
def test_every_order_of_the_products_gives_the_same_bits(format: WeightFormat, search: ScaleSearch) -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(2)) * torch.logspace(-4, 1, 48)[:, None]
    quantized = quantize_weight(weight, format, search=search)
    expected = (gemm_values(quantized).double() * quantized.scale.double()).float()
    assert torch.equal(dequantize_weight(quantized), expected)
    if quantized.block_scales is not None:
        numbers = e2m1.decode(e2m1.unpack(quantized.codes)).unflatten(-1, (-1, 16))
        by_factor = numbers * (quantized.block_scales.float() * quantized.scale).unsqueeze(-1)
        by_divisor = numbers * (quantized.block_scales.float() / quantized.scale.reciprocal()).unsqueeze(-1)
        assert torch.equal(by_factor.flatten(-2), expected)
        assert torch.equal(by_divisor.flatten(-2), expected)
    error = (dequantize_weight(quantized) - weight).norm() / weight.norm()
    assert error < (0.04 if format == "fp8" else 0.11)


def test_searches_make_the_error_smaller() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    errors = {
        search: (dequantize_weight(quantize_weight(weight, "nvfp4", search=search)) - weight).norm().item()
        for search in ("max", "four_over_six", "mse")
    }
    assert errors["mse"] < errors["four_over_six"] < errors["max"]


@pytest.mark.parametrize(("format", "search"), [("nvfp4", "max"), ("nvfp4", "four_over_six"), ("fp8", "max")])
def test_weights_at_the_lower_end_of_fp32_have_normal_scales(format: WeightFormat, search: ScaleSearch) -> None:
    """What lies below half the smallest block scale times the least scale times 6, 3.6e-38, becomes 0."""
    unit = torch.randn(16, 32, generator=torch.Generator().manual_seed(4)).clamp(-1, 1)
    for largest in (1e-31, 1e-34, 1e-36, 1e-38, 1e-42, 1e-45):
        weight = unit * largest
        quantized = quantize_weight(weight, format, search=search)
        assert 2.0**-126 <= quantized.scale < 1e-32
        assert torch.equal(quantized.scale.reciprocal().reciprocal(), quantized.scale)
        assert (dequantize_weight(quantized) - weight).abs().max() <= max(0.2 * largest, 3.6e-38)


def test_a_weight_of_zeros_stays_zero() -> None:
    for format in ("nvfp4", "fp8"):
        assert not dequantize_weight(quantize_weight(torch.zeros(16, 32), format)).any()
