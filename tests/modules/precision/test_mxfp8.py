"""MXFP8 against torchao's codes, and what it does with zeros and what is no number."""

import pytest
import torch

from modules.errors import UserError
from modules.precision import mxfp8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_and_scales_are_torchaos(dtype):
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode

    x = (torch.randn(64, 128) * torch.exp(4 * torch.randn(64, 1))).to(dtype)
    theirs = MXTensor.to_mx(x, torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL)
    ours = mxfp8.quantize(x)
    assert torch.equal(ours.scales.view(torch.uint8), theirs.scale.view(torch.uint8))
    assert torch.equal(ours.codes.view(torch.uint8), theirs.qdata.view(torch.uint8))
    assert torch.equal(mxfp8.dequantize(ours, dtype), theirs.dequantize(dtype))


def test_exact_powers_are_not_rounded_up():
    x = torch.zeros(4, 32)
    x[:, 0] = torch.tensor([448.0, 448 * 2**-20, 449.0, 224.0])
    assert mxfp8.quantize(x).scales.float().squeeze(1).tolist() == [1, 2**-20, 2, 0.5]


def test_nothing_finite_saturates():
    x = torch.randn(256, 32) * torch.exp(5 * torch.randn(256, 1))
    assert ((mxfp8.quantize_dequantize(x) - x).abs() <= x.abs().amax(1, keepdim=True) / 16).all()


def test_what_is_no_number():
    assert torch.equal(mxfp8.quantize_dequantize(torch.zeros(2, 32)), torch.zeros(2, 32))
    x = torch.ones(3, 32)
    x[0, 3], x[1, 3] = float("nan"), float("inf")
    left = mxfp8.quantize_dequantize(x)
    assert left[0].isnan().all()
    assert left[1, 3] == float("inf")
    assert torch.equal(left[2], x[2])
    tiny = torch.full((1, 32), 1e-39)
    assert (mxfp8.quantize_dequantize(tiny) - tiny).abs().max() < 1e-40


def test_along_the_other_axis():
    x = torch.randn(64, 5)
    assert torch.equal(mxfp8.quantize_dequantize(x, axis=-2), mxfp8.quantize_dequantize(x.T.contiguous()).T)
    with pytest.raises(UserError, match="32"):
        mxfp8.quantize(x)
