"""The three products of quantised linears, against dequantise-then-multiply in float64, written out naively."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modules.ops.native.quantization import Options
from modules.precision import e2m1, fp8, mxfp8, nvfp4
from modules.precision.backends import EMULATED
from modules.precision.formats import tensor_amax
from modules.precision.linear import GroupedLinear, Linear
from modules.precision.scheme import Arithmetic, Products, Scheme
from tests.modules.helpers import assert_close, dequantize_nvfp4, hadamard_matrix

BLOCKS = {"nvfp4": 16, "mxfp8": 32, "fp8": 1, "bf16": 1}
ROUNDED_ONCE = 2**-8
"""Half a unit in the last place of bf16, relative, with room for the order of fp32 sums."""
SIZES = [(64, 32, 96), (20, 40, 24), (1, 17, 5)]


def scheme(products: str | tuple[str, str, str], **switches: bool) -> Scheme:
    formats = Products(*[products] * 3) if isinstance(products, str) else Products(*products)
    return Scheme(formats, Arithmetic(**{"stochastic_rounding": False, **switches}), EMULATED)


def make(module: Linear | GroupedLinear, chosen: Scheme, seed: int = 0) -> Linear | GroupedLinear:
    """A module whose weight is a bf16 number, so that no cast blurs the comparison."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(module.weight.shape, generator=generator) * 0.1
    module.weight.data.copy_(weight.bfloat16())
    module.format, module.product = "nvfp4", chosen
    return module


def numbers(*shape: int, seed: int) -> Tensor:
    """bf16 of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()).bfloat16()


def left_of(x: Tensor, chosen: str, kind: str = "x", tiles: bool = False, hadamard: bool = False) -> Tensor:
    """float64 what is left of a matrix quantised along its last axis, filled up with zeros."""
    x = F.pad(x, (0, -x.shape[-1] % BLOCKS[chosen]))
    if chosen == "nvfp4":
        if hadamard:
            x = (x.float().unflatten(-1, (-1, 16)) @ hadamard_matrix()).flatten(-2).bfloat16()
        return dequantize_nvfp4(nvfp4.quantize(x, Options(tiles=tiles))).double()
    if chosen == "mxfp8":
        return mxfp8.dequantize(mxfp8.quantize(x)).double()
    if chosen == "fp8":
        kind = torch.float8_e5m2 if kind == "g" else torch.float8_e4m3fn
        scale = fp8.inverse_scale_of(tensor_amax(x), kind)
        return (fp8.quantize(x, scale, kind).float() / scale).double()
    return x.double()


def expected(x: Tensor, weight: Tensor, grad: Tensor, chosen: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """Result and both gradients."""
    forward, dgrad, wgrad = chosen.products
    tiles, hadamard = chosen.arithmetic.two_dimensional_weights, chosen.arithmetic.hadamard
    left_x, left_weight = left_of(x, forward), left_of(weight, forward, tiles=tiles)
    behind_x, behind_weight = (left[:, : x.shape[1]] for left in (left_x, left_weight))
    if dgrad != "bf16":
        behind_weight = left_of(weight.T, dgrad, tiles=tiles).T
    if wgrad != "bf16":
        behind_x = left_of(x.T, wgrad, hadamard=hadamard).T
    return (
        left_x @ left_weight.T,
        left_of(grad, dgrad, "g") @ F.pad(behind_weight, (0, 0, 0, -len(behind_weight) % BLOCKS[dgrad])),
        left_of(grad.T, wgrad, "g", hadamard=hadamard) @ behind_x,
    )


def computed(module: Linear | GroupedLinear, x: Tensor, grad: Tensor, *offsets: Tensor) -> list[Tensor]:
    """Result and both gradients."""
    x = x.detach().requires_grad_()
    module.weight.grad = None
    y = module(x, *offsets)
    y.backward(grad)
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert module.weight.grad.dtype == torch.float32
    return [y.detach(), x.grad, module.weight.grad]


SCHEMES = {
    "nvfp4": scheme("nvfp4"),
    "nvfp4, no rotation": scheme("nvfp4", hadamard=False),
    "nvfp4, one-dimensional weights": scheme("nvfp4", two_dimensional_weights=False),
    "mxfp8": scheme("mxfp8"),
    "fp8": scheme("fp8"),
    "forward in bf16": scheme(("bf16", "nvfp4", "nvfp4")),
    "backward in bf16": scheme(("nvfp4", "bf16", "bf16")),
    "one gradient in bf16": scheme(("fp8", "nvfp4", "bf16")),
    "all different": scheme(("mxfp8", "nvfp4", "fp8")),
}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("chosen", SCHEMES.values(), ids=SCHEMES.keys())
def test_the_three_products_are_those_of_the_dequantised_operands(chosen: Scheme, sizes) -> None:
    rows, inputs, outputs = sizes
    module = make(Linear(inputs, outputs), chosen)
    x, grad = numbers(rows, inputs, seed=1), numbers(rows, outputs, seed=2)
    wanted = expected(x, module.weight.detach().bfloat16(), grad, chosen)
    for name, actual, exact in zip(("y", "dx", "dW"), computed(module, x, grad), wanted, strict=True):
        assert_close(actual, exact, ROUNDED_ONCE, name)


@pytest.mark.parametrize("sizes", [(64, 32, 96), (40, 24, 20)], ids=str)
@pytest.mark.parametrize("chosen", SCHEMES.values(), ids=SCHEMES.keys())
def test_grouped_is_a_loop_over_experts(chosen: Scheme, sizes) -> None:
    """Each expert is quantised as if it were alone, with its own scales; one has no rows, the last ones a few."""
    rows, inputs, outputs = sizes
    ends = [13, 13, rows - 3, rows]
    module = make(GroupedLinear(4, inputs, outputs), chosen)
    x, grad = numbers(rows, inputs, seed=1), numbers(rows, outputs, seed=2)
    x[:13] *= 100  # a scale over all experts would show
    y, dx, dw = computed(module, x, grad, torch.tensor(ends, dtype=torch.int32))
    for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if start == end:
            assert not dw[expert].any()
            continue
        weight = module.weight[expert].detach().bfloat16()
        wanted = expected(x[start:end], weight, grad[start:end], chosen)
        for name, actual, exact in zip(
            ("y", "dx", "dW"), (y[start:end], dx[start:end], dw[expert]), wanted, strict=True
        ):
            assert_close(actual, exact, ROUNDED_ONCE, f"{name} of expert {expert}")


def test_no_rows_at_all() -> None:
    module = make(GroupedLinear(2, 16, 32), SCHEMES["nvfp4"])
    y, dx, dw = computed(module, numbers(0, 16, seed=1), numbers(0, 32, seed=2), torch.zeros(2, dtype=torch.int32))
    assert y.shape == (0, 32)
    assert dx.shape == (0, 16)
    assert not dw.any()


@pytest.mark.parametrize("chosen", ["nvfp4", "mxfp8", "fp8"])
def test_no_rows_of_a_linear(chosen: str) -> None:
    module = make(Linear(32, 16), SCHEMES[chosen])
    y, dx, dw = computed(module, numbers(0, 32, seed=1), numbers(0, 16, seed=2))
    assert y.shape == (0, 16)
    assert dx.shape == (0, 32)
    assert not dw.any()


def test_leading_axes_are_rows() -> None:
    module = make(Linear(32, 16), SCHEMES["nvfp4"])
    x = numbers(2, 3, 32, seed=1)
    assert torch.equal(module(x), module(x.flatten(0, 1)).view(2, 3, 16))


def gradients_of(grouped: bool, **switches: bool) -> list[Tensor]:
    chosen = scheme("nvfp4", **switches)
    module = make(GroupedLinear(2, 48, 32) if grouped else Linear(48, 32), chosen)
    offsets = [torch.tensor([20, 64], dtype=torch.int32)] if grouped else []
    return computed(module, numbers(64, 48, seed=1), numbers(64, 32, seed=2), *offsets)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("switch", "changed"),
    [
        ({"hadamard": False}, (False, False, True)),
        ({"stochastic_rounding": True}, (False, True, True)),
        ({"two_dimensional_weights": False}, (True, True, False)),
    ],
    ids=str,
)
def test_each_switch_changes_its_own_products_only(switch, changed, grouped: bool) -> None:
    plain, other = gradients_of(grouped), gradients_of(grouped, **switch)
    assert [not torch.equal(*pair) for pair in zip(plain, other, strict=True)] == list(changed)


@pytest.mark.parametrize("grouped", [False, True])
def test_stochastic_rounding_is_unbiased_where_the_nearest_is_not(grouped: bool) -> None:
    """The mean over many draws comes near the gradients of unrounded g; rounding to the nearest stays where it is."""
    draws = 200
    module = make(GroupedLinear(2, 32, 48) if grouped else Linear(32, 48), scheme("nvfp4", stochastic_rounding=True))
    offsets = [torch.tensor([20, 64], dtype=torch.int32)] if grouped else []
    x, grad = numbers(64, 32, seed=1), numbers(64, 48, seed=2)
    sums = [torch.zeros(()), torch.zeros(())]
    for seed in range(draws):
        module.product.arithmetic.reseed(seed)
        sums = [
            total + drawn.double() for total, drawn in zip(sums, computed(module, x, grad, *offsets)[1:], strict=True)
        ]
    module.product = scheme(("nvfp4", "nvfp4", "nvfp4"))
    nearest = computed(module, x, grad, *offsets)[1:]
    exact = unrounded(module, x, grad, *offsets)
    for name, total, rounded, wanted in zip(("dx", "dW"), sums, nearest, exact, strict=True):
        bias = (total / draws - wanted).norm() / wanted.norm()
        error = (rounded.double() - wanted).norm() / wanted.norm()
        assert bias < 0.25 * error, f"{name}: {bias:.4f} against {error:.4f}"


def unrounded(module: Linear | GroupedLinear, x: Tensor, grad: Tensor, offsets: Tensor | None = None) -> list[Tensor]:
    """Both gradients with the other operand quantised and g as it is."""
    if offsets is not None:
        parts, start = [], 0
        for weight, end in zip(module.weight.detach(), offsets.tolist(), strict=True):
            alone = make(Linear(*reversed(weight.shape)), module.product)
            alone.weight.data.copy_(weight)
            parts.append(unrounded(alone, x[start:end], grad[start:end]))
            start = end
        return [torch.cat([dx for dx, _ in parts]), torch.stack([dw for _, dw in parts])]
    weight, g = module.weight.detach().bfloat16(), F.pad(grad, (0, 0, 0, -len(grad) % 16))
    rotated = (g.T.double().unflatten(-1, (-1, 16)) @ hadamard_matrix().double()).flatten(-2)
    dx = grad.double() @ left_of(weight.T, "nvfp4", tiles=True).T
    return [dx, rotated @ left_of(x.T, "nvfp4", hadamard=True).T]


def test_the_same_seed_draws_the_same_and_another_one_others() -> None:
    module = make(Linear(48, 32), scheme("nvfp4", stochastic_rounding=True))
    drawn = []
    for seed in (1, 1, 2):
        module.product.arithmetic.reseed(seed)
        drawn.append(computed(module, numbers(64, 48, seed=1), numbers(64, 32, seed=2)))
    assert all(torch.equal(*pair) for pair in zip(drawn[0], drawn[1], strict=True))
    assert not torch.equal(drawn[0][1], drawn[2][1])
    assert not torch.equal(drawn[0][2], drawn[2][2])


def test_an_observer_sees_every_operand_as_it_is_multiplied() -> None:
    module = make(Linear(48, 32), SCHEMES["nvfp4"])
    seen: dict[str, tuple[Tensor, ...]] = {}
    module.product.arithmetic.observer = lambda _, operand, *tensors: seen.update({operand: tensors})
    try:
        x, grad = numbers(64, 48, seed=1), numbers(64, 32, seed=2)
        y, dx, dw = computed(module, x, grad)
    finally:
        module.product.arithmetic.observer = None
    assert set(seen) == {"fprop.x", "fprop.w", "dgrad.g", "dgrad.w", "wgrad.g", "wgrad.x"}
    left = {operand: after for operand, (_, after, _) in seen.items()}
    assert_close(y, left["fprop.x"] @ left["fprop.w"].T, ROUNDED_ONCE)
    assert_close(dx, left["dgrad.g"] @ left["dgrad.w"], ROUNDED_ONCE)
    assert_close(dw, left["wgrad.g"].T @ left["wgrad.x"], ROUNDED_ONCE)
    assert torch.equal(seen["fprop.x"][0], x)
    assert_close(seen["wgrad.x"][0], (hadamard_matrix().T @ x.float().view(-1, 16, 48)).flatten(0, 1), 2**-8)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("experts", [None, 3])
def test_an_observer_is_told_where_clipping_begins(experts: int | None, stochastic: bool) -> None:
    """7 at the scale of each block: over a seventh of it, everything that is left is a number of E2M1."""
    chosen = scheme("nvfp4", stochastic_rounding=stochastic)
    module = make(Linear(40, 24) if experts is None else GroupedLinear(experts, 40, 24), chosen)
    offsets = () if experts is None else (torch.tensor([5, 5, 40], dtype=torch.int32),)
    seen: dict[str, tuple[Tensor, ...]] = {}
    chosen.arithmetic.observer = lambda _, operand, *tensors: seen.update({operand: tensors})
    x = numbers(40, 40, seed=1) * torch.logspace(-7, 2, 40)[:, None]
    computed(module, x.bfloat16(), numbers(40, 24, seed=2), *offsets)
    assert len(seen) == 6
    for operand, (before, after, bound) in seen.items():
        left = (after / bound * 7).abs()
        assert ((left[..., None] - torch.tensor(e2m1.GRID)).abs().amin(-1) <= 1e-5).all(), operand
        assert bound.shape == before.shape == after.shape
        assert not after[bound.isinf()].any(), operand
        assert ((before.float().abs() <= bound) | ((left - 6).abs() < 1e-5)).all(), operand
    assert seen["fprop.x"][2].isinf().any()


def test_a_gradient_for_the_weight_alone_or_the_inputs_alone() -> None:
    module, x, grad = make(Linear(48, 32), SCHEMES["nvfp4"]), numbers(64, 48, seed=1), numbers(64, 32, seed=2)
    _, dx, dw = computed(module, x, grad)
    module.weight.grad = None
    module(x).backward(grad)
    assert torch.equal(module.weight.grad, dw)
    module.weight.requires_grad_(False)
    x.requires_grad_()
    module(x).backward(grad)
    assert torch.equal(x.grad, dx)
