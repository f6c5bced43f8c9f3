"""Layers run as they are served, against the formulas of NVFP4 and FP8 written out value by value in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import modules.precision.quantized_product
from modules.errors import UserError
from modules.ops import scaled
from modules.ops.native import quantization as native
from modules.precision.backends import EMULATED
from modules.precision.linear import GroupedLinear, Head, Linear
from modules.precision.quantized import QuantizedWeight, WeightFormat, quantize_weight, tensor_scale
from modules.precision.quantized_product import install, temporarily
from modules.precision.recipe import quantized_schemes
from modules.precision.scheme import Arithmetic, Products, Scheme
from tests.modules.helpers import assert_close

ROUNDED_ONCE = 2**-8
"""Half a unit in the last place of bf16, relative, with room for the order of fp32 sums."""
GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
"""All its numbers that are not negative, 448 the last."""
FORMATS = [("nvfp4", True), ("nvfp4", False), ("fp8", True)]


@pytest.fixture(params=["C code", "portable"], autouse=True)
def _quantiser(request, monkeypatch):
    if request.param == "portable":
        monkeypatch.setattr(native, "load", lambda: (None, "switched off"))
    elif native.load()[0] is None:
        pytest.skip(native.load()[1])


def nearest(x: Tensor, numbers: Tensor) -> Tensor:
    """Return the nearest of the numbers with the sign of x; of two equally near, the one with an even index."""
    x, size = x.unsqueeze(-1), x.abs().unsqueeze(-1)
    gap = (size - numbers).abs()
    order = gap + (torch.arange(len(numbers)) % 2) * gap.new_full((), 1e-30)
    return numbers[order.argmin(-1)] * x.squeeze(-1).sign()


def rounded(x: Tensor, format: str, scale: Tensor) -> Tensor:
    """Return float64 what is left of inputs [R, I] under the frozen scale of their tensor: qad.md, 4.1."""
    x, scale = x.double(), scale.double()
    if format == "fp8":
        return nearest((x / scale).clamp(-448, 448), E4M3) * scale
    blocks = x.unflatten(-1, (-1, 16))
    amax = blocks.abs().amax(-1, keepdim=True)
    block_scale = nearest((amax / (6 * scale)).clamp(max=448), E4M3)
    step = torch.where(block_scale > 0, block_scale * scale, 1.0)
    numbers = nearest((blocks / step).clamp(-6, 6), GRID)
    return (numbers * block_scale * scale).flatten(-2)


def decoded(weight: QuantizedWeight) -> Tensor:
    """Return float64 [O, I], code by code."""
    if weight.block_scales is None:
        return weight.codes.double() * weight.scale.double()
    rows, half = weight.codes.shape
    out = torch.empty(rows, 2 * half, dtype=torch.float64)
    for row in range(rows):
        for column in range(2 * half):
            byte = int(weight.codes[row, column // 2])
            code = byte >> 4 if column % 2 else byte & 15
            number = GRID[code & 7] * (-1 if code & 8 else 1)
            out[row, column] = number * weight.block_scales[row, column // 16].double() * weight.scale.double()
    return out


def inputs(rows: int, features: int, seed: int = 1) -> Tensor:
    """bf16 of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, features, generator=generator) * torch.randn(rows, 1, generator=generator).exp()
    ).bfloat16()


def quantized(
    out_features: int, in_features: int, format: WeightFormat, amax: float | None, seed: int = 0
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.1
    scale = None if amax is None else tensor_scale(torch.tensor(amax), format)
    return quantize_weight(weight, format, input_scale=scale)


def expected(x: Tensor, weight: QuantizedWeight) -> Tensor:
    left = x.double() if weight.input_scale is None else rounded(x, weight.format, weight.input_scale)
    return left @ decoded(weight).T


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("amax", [30.0, 0.5], ids=["nothing saturates", "most saturates"])
@pytest.mark.parametrize(("format", "with_inputs"), FORMATS)
def test_a_linear_multiplies_what_is_left_of_inputs_and_weight(format, with_inputs, amax, rows) -> None:
    weight = quantized(24, 48, format, amax if with_inputs else None)
    module, x = Linear(48, 24), inputs(rows, 48)
    install(module, [weight])
    y = module(x)
    assert y.dtype == torch.bfloat16
    assert_close(y, expected(x, weight), ROUNDED_ONCE)
    plain = x.double() @ decoded(weight).T
    assert (F.mse_loss(y.double(), plain) > 1e-4 * plain.square().mean()) == with_inputs, "inputs were rounded, or not"


def test_a_linear_takes_any_leading_axes_and_dtypes_and_no_rows() -> None:
    module = Linear(32, 16)
    install(module, [quantized(16, 32, "nvfp4", 5.0)])
    x = inputs(6, 32)
    y = module(x)
    assert torch.equal(module(x.view(2, 3, 32)), y.view(2, 3, 16))
    assert torch.equal(module(x.float()), y)
    assert torch.equal(module(x[:1])[0], module(x[0]))
    assert module(x[:0]).shape == (0, 16)
    assert module(x[:0].view(2, 0, 32)).shape == (2, 0, 16)


def test_inputs_beyond_the_frozen_largest_saturate() -> None:
    """The largest is 2688 times the input scale. A 1 becomes 6 blocks' scales of 352 (of 341 1/3, rounded)."""
    weight = QuantizedWeight(
        "nvfp4",
        codes=torch.tensor([[0x02] + [0] * 7], dtype=torch.uint8),  # 1 times the first input
        block_scales=torch.ones(1, 1, dtype=torch.float8_e4m3fn),
        scale=torch.ones(()),
        input_scale=torch.tensor(2.0**-11),
    )
    module, x = Linear(16, 1), torch.zeros(4, 16)
    install(module, [weight])
    x[:, 0] = torch.tensor([1.0, 2688 * 2.0**-11, 50.0, float("inf")])
    assert module(x).flatten().tolist() == [1.03125, 1.3125, 1.3125, 1.3125]


@pytest.mark.parametrize("shared", [True, False], ids=["one input scale", "an input scale for each expert"])
@pytest.mark.parametrize(("format", "with_inputs"), FORMATS)
def test_grouped_is_a_loop_over_experts(format, with_inputs, shared) -> None:
    """One expert has no rows; the scales of weights and inputs differ, so a swap of two would show."""
    ends = [13, 13, 37, 40]
    weights = [
        quantized(24, 32, format, (3.0 if shared else 0.2 * 8.0**expert) if with_inputs else None, seed=expert)
        for expert in range(4)
    ]
    weights[2] = weights[2]._replace(scale=weights[2].scale * 64)
    module, x = GroupedLinear(4, 32, 24), inputs(40, 32)
    install(module, weights)
    y = module(x, torch.tensor(ends, dtype=torch.int32))
    for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if end > start:
            assert_close(y[start:end], expected(x[start:end], weights[expert]), ROUNDED_ONCE, f"expert {expert}")
    assert module(x[:0], torch.zeros(4, dtype=torch.int32)).shape == (0, 24)


def test_a_cpu_without_instructions_for_bf16_multiplies_in_fp32(monkeypatch) -> None:
    """The same sums, rounded once; nothing goes to bf16 products, which are slow there."""
    weights, x = [quantized(24, 32, "nvfp4", 5.0, seed=expert) for expert in range(2)], inputs(40, 32)
    module, grouped, ends = Linear(32, 24), GroupedLinear(2, 32, 24), torch.tensor([7, 40], dtype=torch.int32)
    install(module, weights[:1])
    install(grouped, weights)
    monkeypatch.setattr(scaled, "cpu_multiplies_bf16", lambda: False)
    monkeypatch.setattr(torch, "addmm", None)
    assert_close(module(x), expected(x, weights[0]), ROUNDED_ONCE)
    for weight, rows in zip(weights, (slice(0, 7), slice(7, 40)), strict=True):
        assert_close(grouped(x, ends)[rows], expected(x[rows], weight), ROUNDED_ONCE)


def test_a_head_gives_logits_of_the_lowest_ids_too() -> None:
    weight, x = quantized(24, 32, "fp8", 5.0), inputs(7, 32)
    head = Head(32, 24)
    install(head, [weight])
    assert_close(head(x), expected(x, weight), ROUNDED_ONCE)
    assert torch.equal(head(x, vocabulary=8), head(x)[:, :8])
    assert head(x).dtype == torch.float32


def test_codes_of_fp8_give_the_same_product(monkeypatch) -> None:
    """What a GPU computes, on the CPU; rows that are no multiple of 16, a head's lowest ids that are none either."""
    weight, x = quantized(48, 32, "fp8", 5.0), inputs(21, 32)
    plain, head = Linear(32, 48), Head(32, 48)
    install(plain, [weight])
    monkeypatch.setattr(modules.precision.quantized_product, "_multiplies_fp8", lambda weight: True)
    with temporarily(plain, [weight]):
        assert plain.weight.dtype == torch.float8_e4m3fn
        y = plain(x.view(3, 7, 32))
        assert plain(x[:0]).shape == (0, 48)
    assert_close(y.view(21, 48), expected(x, weight), ROUNDED_ONCE)
    assert_close(y.view(21, 48), plain(x), ROUNDED_ONCE)
    install(head, [weight])
    assert_close(head(x, vocabulary=20), expected(x, weight)[:, :20], ROUNDED_ONCE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize(("format", "with_inputs"), FORMATS)
def test_a_gpu_agrees_with_the_formulas(format, with_inputs, rows) -> None:
    weight, x = quantized(64, 128, format, 5.0 if with_inputs else None), inputs(rows, 128)
    module, grouped = Linear(128, 64).cuda(), GroupedLinear(2, 128, 64).cuda()
    install(module, [weight])
    install(grouped, [weight, weight])
    assert_close(module(x.cuda()).cpu(), expected(x, weight), 2 * ROUNDED_ONCE)
    ends = torch.tensor([rows // 2, rows], dtype=torch.int32, device="cuda")
    assert_close(grouped(x.cuda(), ends).cpu(), expected(x, weight), 2 * ROUNDED_ONCE)


def test_a_module_is_served_for_a_while_and_is_then_what_it_was() -> None:
    module = Linear(32, 16)
    torch.nn.init.normal_(module.weight)
    module.format, module.product = "nvfp4", Scheme(Products.all_in("nvfp4"), Arithmetic(), EMULATED)
    before, x = dict(vars(module)), inputs(5, 32)
    parameter, bits, y = module.weight, module.weight.detach().clone(), module(x)

    def check() -> None:
        assert module.weight is parameter
        assert torch.equal(module.weight, bits)
        assert {name: vars(module)[name] for name in before} == before
        assert torch.equal(module(x), y)

    with temporarily(module, [quantized(16, 32, "fp8", 5.0)]):
        assert quantized_schemes(module) == {}
        first = module(x)
        assert not torch.equal(first, y)
        with temporarily(module, [quantized(16, 32, "nvfp4", None)]):
            assert not torch.equal(module(x), first)
        assert torch.equal(module(x), first)
    check()
    with pytest.raises(KeyboardInterrupt), temporarily(module, [quantized(16, 32, "fp8", 5.0)]):
        raise KeyboardInterrupt
    check()
    with (
        pytest.raises(UserError, match="divisible by 16"),
        temporarily(module, [quantized(16, 24, "nvfp4", 5.0)]),
    ):
        pass
    check()


@pytest.mark.parametrize(("format", "quantizes_inputs"), FORMATS)
def test_inputs_get_the_gradient_of_the_dequantised_weight(format: WeightFormat, quantizes_inputs: bool) -> None:
    """Straight through the rounding of the inputs; the weight itself is frozen."""
    module, weight = Linear(32, 16), quantized(16, 32, format, 5.0 if quantizes_inputs else None)
    install(module, [weight])
    x, grad = inputs(6, 32).float().view(2, 3, 32).requires_grad_(), inputs(6, 16).view(2, 3, 16)
    module(x).backward(grad)
    assert_close(x.grad.double(), grad.double() @ decoded(weight), ROUNDED_ONCE)
    assert module.weight.grad is None

    experts, offsets = GroupedLinear(3, 32, 16), torch.tensor([2, 2, 5], dtype=torch.int32)
    weights = [quantized(16, 32, format, scale if quantizes_inputs else None) for scale in (3.0, 4.0, 5.0)]
    install(experts, weights)
    x, grad = inputs(5, 32).float().requires_grad_(), inputs(5, 16)
    experts(x, offsets).backward(grad)
    for rows, expert in ((slice(0, 2), 0), (slice(2, 5), 2)):
        assert_close(x.grad[rows].double(), grad[rows].double() @ decoded(weights[expert]), ROUNDED_ONCE)
