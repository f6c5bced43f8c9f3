"""FP8 with a scale a tensor: saturation, zeros, what is no number, scales per expert."""

import pytest
import torch

from modules.precision import fp8


@pytest.mark.parametrize(("dtype", "largest", "digits"), [(torch.float8_e4m3fn, 448, 3), (torch.float8_e5m2, 57344, 2)])
def test_numbers_keep_their_digits(dtype, largest, digits):
    x = torch.randn(64, 64)
    quantized = fp8.quantize(x, dtype=dtype)
    assert quantized.codes.dtype == dtype
    assert quantized.codes.float().abs().max() == largest
    large = x.abs() > x.abs().max() / 64
    error = (fp8.dequantize(quantized) - x).abs() / x.abs()
    assert error[large].max() <= 2.0 ** -(digits + 1) * 1.0001


def test_frozen_scales_saturate():
    left = fp8.quantize_dequantize(torch.tensor([0.5, 3.0, -float("inf")]), amax=torch.tensor(1.0))
    assert left.tolist() == [0.5, 1, -1]


def test_what_is_no_number():
    assert torch.equal(fp8.quantize_dequantize(torch.zeros(4)), torch.zeros(4))
    assert fp8.quantize(torch.zeros(4)).encode_scale == 1
    assert fp8.quantize_dequantize(torch.tensor([1.0, float("inf")])).tolist() == [1, 448]
    assert fp8.quantize_dequantize(torch.tensor([1.0, float("nan")])).isnan().all()
    frozen = fp8.quantize_dequantize(torch.tensor([1.0, float("nan")]), amax=torch.tensor(2.0))
    assert frozen.isnan().tolist() == [False, True]
    tiny = torch.tensor([1e-44, 0, -1e-44])
    assert fp8.quantize_dequantize(tiny).isfinite().all()


def test_a_scale_per_expert_is_the_scale_of_each_expert():
    x = torch.randn(3, 8, 16) * torch.tensor([1, 100, 0.01]).view(3, 1, 1)
    whole = fp8.quantize(x, stacked=True)
    assert whole.encode_scale.shape == (3,)
    assert torch.equal(fp8.dequantize(whole), torch.stack([fp8.quantize_dequantize(expert) for expert in x]))


def test_the_dtype_is_kept():
    x = torch.randn(4, 16).bfloat16()
    assert fp8.quantize_dequantize(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operands_of_products_are_the_codes(dtype):
    x = torch.randn(20, 48).to(dtype)
    for options in ({}, {"encode": torch.tensor(300.0)}, {"dtype": torch.float8_e5m2}):
        values, scale = fp8.gemm_operand(x, **options)
        quantized = fp8.quantize(x, **options)
        assert values.dtype == torch.bfloat16
        assert torch.equal(values.float(), quantized.codes.float())
        assert scale == 1 / quantized.encode_scale
    given = {"encode": torch.tensor(300.0)}
    assert torch.equal(fp8.quantize_dequantize(x, **given), fp8.dequantize(fp8.quantize(x, **given), dtype))
