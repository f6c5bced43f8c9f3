"""FP8 with a scale a tensor: saturation, zeros, what is no number, scales per expert."""

import pytest
import torch

from modules.precision import fp8
from modules.precision.formats import tensor_amax


def scale_of(x, dtype=torch.float8_e4m3fn, stacked=False):
    return fp8.inverse_scale_of(tensor_amax(x, stacked), dtype)


def left_of(x):
    return fp8.quantize_dequantize(x, scale_of(x))


@pytest.mark.parametrize(("dtype", "largest", "digits"), [(torch.float8_e4m3fn, 448, 3), (torch.float8_e5m2, 57344, 2)])
def test_numbers_keep_their_digits(dtype, largest, digits):
    x = torch.randn(64, 64)
    codes = fp8.quantize(x, scale_of(x, dtype), dtype)
    assert codes.dtype == dtype
    assert codes.float().abs().max() == largest
    large = x.abs() > x.abs().max() / 64
    error = (codes.float() / scale_of(x, dtype) - x).abs() / x.abs()
    assert error[large].max() <= 2.0 ** -(digits + 1) * 1.0001


def test_frozen_scales_saturate():
    left = fp8.quantize_dequantize(torch.tensor([0.5, 3.0, -float("inf")]), fp8.inverse_scale_of(torch.tensor(1.0)))
    assert left.tolist() == [0.5, 1, -1]


def test_what_is_no_number():
    assert torch.equal(left_of(torch.zeros(4)), torch.zeros(4))
    assert scale_of(torch.zeros(4)) == 1
    assert left_of(torch.tensor([1.0, float("inf")])).tolist() == [1, 448]
    assert left_of(torch.tensor([1.0, float("nan")])).isnan().all()
    frozen = fp8.quantize_dequantize(torch.tensor([1.0, float("nan")]), fp8.inverse_scale_of(torch.tensor(2.0)))
    assert frozen.isnan().tolist() == [False, True]
    tiny = torch.tensor([1e-44, 0, -1e-44])
    assert left_of(tiny).isfinite().all()


def test_a_scale_per_expert_is_the_scale_of_each_expert():
    x = torch.randn(3, 8, 16) * torch.tensor([1, 100, 0.01]).view(3, 1, 1)
    scales = scale_of(x, stacked=True)
    assert scales.shape == (3,)
    assert torch.equal(fp8.quantize_dequantize(x, scales), torch.stack([left_of(expert) for expert in x]))


def test_the_dtype_is_kept():
    x = torch.randn(4, 16).bfloat16()
    assert left_of(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operands_of_products_are_the_codes(dtype):
    x = torch.randn(20, 48).to(dtype)
    given, e5m2 = torch.tensor(300.0), torch.float8_e5m2
    for options in ((scale_of(x),), (given,), (scale_of(x, e5m2), e5m2)):
        values, scale = fp8.gemm_operand(x, *options)
        codes = fp8.quantize(x, *options)
        assert values.dtype == torch.bfloat16
        assert torch.equal(values.float(), codes.float())
        assert scale == 1 / options[0]
    assert torch.equal(fp8.quantize_dequantize(x, given), (fp8.quantize(x, given).float() / given).to(dtype))
