"""Sums over operands: tensors worked out by hand, and what a module multiplies."""

import math

import pytest
import torch
from torch import Tensor, nn

from callbacks.operands import OPERANDS, OperandSums, operand_metrics, operand_sums
from modules.precision.linear import Linear
from modules.precision.recipe import PrecisionConfig, PrecisionRule, assign_formats, quantized_schemes

STEP = 2.0**-9
"""Smallest number of E4M3, hence the smallest scale of a block."""
ROWS = [
    # Largest of the tensor: S is 1. Scale 448: 112 lies between 0 and 224, and the even one of them is 0.
    [2688.0, -448.0, 112.0, 120.0],
    # Scale 2: 0.5 is a quarter of it and becomes 0, 1 is half of it and stays.
    [12.0, 1.0, -0.5, 0.25],
    # Scale 1.4 STEP, which is STEP: 8.375 is clipped to 6, -6.75 is rounded to it.
    [8.375 * STEP, -6.75 * STEP, 1.0 * STEP, 0.125 * STEP],
    # Scale 0.4 STEP, which is 0: everything vanishes, nothing is clipped.
    [2.375 * STEP, -1.0 * STEP, 0.5 * STEP, 0.0],
]
LEFT = [
    [2688.0, -448.0, 0.0, 224.0],
    [12.0, 1.0, 0.0, 0.0],
    [6.0 * STEP, -6.0 * STEP, 1.0 * STEP, 0.0],
    [0.0, 0.0, 0.0, 0.0],
]
NONZERO, VANISHED, CLIPPED = 15, 7, 1


def seen_by(module: nn.Module, x: Tensor, grad: Tensor | None = None) -> tuple[OperandSums, Tensor]:
    schemes = quantized_schemes(module)
    sums = OperandSums(schemes, x.device)
    for scheme in schemes.values():
        scheme.arithmetic.observer = sums.add
    out = module(x.requires_grad_())
    if grad is not None:
        out.backward(grad)
    return sums, sums.sums.view(len(schemes), len(OPERANDS), 5)


def quantized(module: nn.Module, chosen: str, **changes) -> nn.Module:
    rules = [PrecisionRule(pattern="*", format=chosen)]
    assign_formats(PrecisionConfig(recipe=None, rules=rules, bf16_tail=0, **changes), module)
    return module


def by_hand() -> tuple[float, float]:
    pairs = [(x, left) for row, other in zip(ROWS, LEFT, strict=True) for x, left in zip(row, other, strict=True)]
    return sum(x**2 for x, _ in pairs), sum((x - left) ** 2 for x, left in pairs)


def test_underflow_saturation_and_noise_by_hand() -> None:
    """Blocks of 16 of one row, which ends inside a block: the zeros that fill them up count nowhere."""
    module = quantized(nn.Sequential(Linear(60, 4)), "nvfp4")
    nn.init.ones_(module[0].weight)
    blocks = torch.zeros(4, 16)
    blocks[:, :4] = torch.tensor(ROWS)
    collected, sums = seen_by(module, blocks.view(1, 64)[:, :60])
    power, error = by_hand()
    assert sums[0, 0].tolist() == pytest.approx([NONZERO, VANISHED, CLIPPED, power, error], rel=1e-12)
    curves = collected.metrics(collected.sums.tolist())
    assert curves["quantization/underflow/fprop.x/0"] == VANISHED / NONZERO
    assert curves["quantization/saturation/0"] == curves["quantization/saturation/fprop.x/worst"] == CLIPPED / NONZERO
    assert curves["quantization/snr_db/fprop.x/0"] == pytest.approx(10 * math.log10(power / error))
    assert not any("grad" in name for name in curves), "nothing was differentiated"


def test_a_scale_that_is_rounded_down_clips_nothing() -> None:
    """1.0625 is half way between two scales and goes to the lower: 6.375 is next to 6, less than half a step of 2."""
    module = quantized(nn.Sequential(Linear(32, 4)), "nvfp4")
    nn.init.ones_(module[0].weight)
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16] = 2688.0, 6.375
    _, sums = seen_by(module, x)
    assert sums[0, 0, :3].tolist() == [2, 0, 0]
    assert sums[0, 0, 4] == 0.375**2


@pytest.mark.parametrize("chosen", ["fp8", "mxfp8"])
def test_eight_bits_clip_nothing_finite(chosen: str) -> None:
    module = quantized(nn.Sequential(Linear(48, 32)), chosen)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        module[0].weight.copy_(torch.randn(32, 48, generator=generator) * 1e-4)
    x = torch.randn(40, 48, generator=generator) * torch.logspace(-9, 3, 48)
    _, sums = seen_by(module, x, torch.randn(40, 32, generator=generator).bfloat16() * 1e-20)
    assert (sums[..., 0] > 0).all()
    assert not sums[..., 2].any()
    assert (10 * (sums[..., 3] / sums[..., 4]).log10() > 25).all(), "tiny gradients have a ratio like others"


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float8_e4m3fn, 464.0), (torch.float8_e5m2, 61440.0)])
def test_beyond_the_bound_of_fp8_the_grid_would_have_had_another_number(dtype: torch.dtype, bound: float) -> None:
    from modules.precision.fp8 import clipping_bound

    largest, step = torch.finfo(dtype).max, {torch.float8_e4m3fn: 32, torch.float8_e5m2: 8192}[dtype]
    neighbours = torch.tensor([largest - step, largest]).to(dtype)
    assert neighbours.view(torch.uint8).diff().item() == 1, "the last step"
    assert clipping_bound(dtype) == bound == largest + step / 2


def test_sums_are_those_of_plain_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(6, 8, generator=generator).bfloat16()
    before[0] = 0
    after = torch.where(before.abs() > 0.4, (before.float() * 4).round() / 4, 0.0)
    bound = torch.full((6, 1), 1.0)
    bound[3] = math.inf
    expected = [0, 0, 0, 0.0, 0.0]
    for row, others, (limit,) in zip(before.tolist(), after.tolist(), bound.tolist(), strict=True):
        for x, left in zip(row, others, strict=True):
            for place, value in enumerate((x != 0, x != 0 and left == 0, abs(x) > limit, x**2, (x - left) ** 2)):
                expected[place] += value
    assert operand_sums(before, after, bound).tolist() == pytest.approx(expected, rel=1e-6)


def test_curves_name_the_worst_and_the_mean() -> None:
    curves = operand_metrics(
        {
            ("a", "fprop.x"): (10.0, 1.0, 0.0, 100.0, 1.0),
            ("b", "fprop.x"): (10.0, 3.0, 1.0, 1000.0, 1.0),
            ("b", "dgrad.g"): (4.0, 0.0, 2.0, 8.0, 0.0),
            ("a", "dgrad.g"): (0.0, 0.0, 0.0, 0.0, 0.0),
            ("a", "wgrad.g"): (4.0, 0.0, 0.0, math.nan, math.nan),
        }
    )
    assert curves == pytest.approx(
        {
            "quantization/underflow/fprop.x/a": 0.1,
            "quantization/underflow/fprop.x/b": 0.3,
            "quantization/underflow/fprop.x/worst": 0.3,
            "quantization/underflow/fprop.x/mean": 0.2,
            "quantization/underflow/dgrad.g/b": 0.0,
            "quantization/underflow/dgrad.g/worst": 0.0,
            "quantization/underflow/dgrad.g/mean": 0.0,
            "quantization/snr_db/fprop.x/a": 20.0,
            "quantization/snr_db/fprop.x/b": 30.0,
            "quantization/snr_db/fprop.x/worst": 20.0,
            "quantization/snr_db/fprop.x/mean": 25.0,
            "quantization/saturation/fprop.x/worst": 0.1,
            "quantization/saturation/fprop.x/mean": 0.05,
            "quantization/saturation/dgrad.g/worst": 0.5,
            "quantization/saturation/dgrad.g/mean": 0.5,
            "quantization/saturation/a": 0.0,
            "quantization/saturation/b": 0.5,
        }
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_looking_does_not_wait_for_the_device() -> None:
    module = quantized(nn.Sequential(Linear(48, 32)), "nvfp4").cuda()
    nn.init.normal_(module[0].weight)
    x, grad = torch.randn(64, 48, device="cuda"), torch.randn(64, 32, device="cuda").bfloat16()
    seen_by(module, x, grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        seen_by(module, x, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
