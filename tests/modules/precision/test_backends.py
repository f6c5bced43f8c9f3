"""Which backend computes, why another does not, and what the others are asked for."""

import contextlib
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.backbone.model import Network
from modules.precision.backends import EMULATED, torchao, transformer_engine
from modules.precision.backends.torchao import TorchAO
from modules.precision.backends.transformer_engine import TransformerEngine
from modules.precision.linear import GroupedLinear, Linear
from modules.precision.recipe import FormatSwitch, PrecisionConfig, PrecisionRule, assign_formats, quantized_schemes
from modules.precision.scheme import Arithmetic, Products, Scheme
from modules.precision.table import precision_lines
from tests.modules.helpers import assert_close, tiny_config

ON_A_GPU = {"device_type": "cuda"}
SIZES = torch.Size((256, 128))
FP8 = [PrecisionRule(pattern="*", format="fp8")]


def uniform(chosen: str) -> Products:
    return Products(*[chosen] * 3)


def network() -> Network:
    with torch.device("meta"):
        return Network(tiny_config())


@pytest.fixture
def gpu(monkeypatch):
    """Say that there is a GPU of a compute capability."""

    def pretend(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return pretend


def test_auto_takes_what_runs_and_says_why_not_the_others() -> None:
    built = network()
    table = assign_formats(PrecisionConfig(), built)
    schemes = quantized_schemes(built)
    assert {scheme.backend for scheme in schemes.values()} == {EMULATED}
    lines = precision_lines(table, built, 2, by_module=False)
    for chosen in ("nvfp4", "mxfp8"):
        for name in ("transformer_engine", "torchao"):
            assert f"{chosen} not by {name}: no CUDA device" in lines


@pytest.mark.parametrize("name", ["transformer_engine", "torchao"])
def test_a_backend_that_does_not_run_is_a_named_error(name: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^model\.precision\.backend: {name} cannot compute backbone\.layers\.0\.mixer\.in_proj in nvfp4 here: "
        "no CUDA device; take auto or emulated$",
    ):
        assign_formats(PrecisionConfig(backend=name), network())


def test_the_emulated_backend_can_be_asked_for() -> None:
    built = network()
    assign_formats(PrecisionConfig(backend="emulated"), built, **ON_A_GPU)
    assert {scheme.backend.name for scheme in quantized_schemes(built).values()} == {"emulated"}


@pytest.mark.parametrize(
    ("products", "arithmetic", "shape", "capability", "reason"),
    [
        (uniform("nvfp4"), Arithmetic(), SIZES, (9, 0), "nvfp4 needs a GPU of compute capability 10.0"),
        (uniform("fp8"), Arithmetic(), SIZES, (8, 0), "fp8 needs a GPU of compute capability 8.9"),
        (uniform("fp8"), Arithmetic(), SIZES, (9, 0), ""),
        (uniform("nvfp4"), Arithmetic(), torch.Size((96, 128)), (10, 0), "nvfp4 needs sizes that are multiples of 128"),
        (uniform("mxfp8"), Arithmetic(), torch.Size((8, 64, 64)), (10, 0), "it computes no products of experts"),
        (Products("mxfp8", "bf16", "bf16"), Arithmetic(), SIZES, (10, 0), "it computes all three products of a module"),
        (uniform("nvfp4"), Arithmetic(hadamard=False), SIZES, (10, 0), "its NVFP4 always rotates"),
    ],
)
def test_what_torchao_refuses(products, arithmetic, shape, capability, reason: str, gpu) -> None:
    pytest.importorskip("torchao")
    gpu(capability)
    found = TorchAO().refusal(products, arithmetic, shape, "cuda")
    assert found.startswith(reason) if reason else found == ""
    assert TorchAO().refusal(products, arithmetic, shape, "cpu") == "no CUDA device"


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((8, 0), {"fp8": "emulated", "mxfp8": "emulated", "nvfp4": "emulated"}),
        ((8, 9), {"fp8": "transformer_engine", "mxfp8": "emulated", "nvfp4": "emulated"}),
        ((9, 0), {"fp8": "transformer_engine", "mxfp8": "emulated", "nvfp4": "emulated"}),
        ((10, 0), dict.fromkeys(["fp8", "mxfp8", "nvfp4"], "transformer_engine")),
        ((10, 3), dict.fromkeys(["fp8", "mxfp8", "nvfp4"], "transformer_engine")),
    ],
)
def test_a_gpu_elsewhere_is_judged_by_its_capability_with_the_packages_installed(
    capability: tuple[int, int], expected: dict[str, str], monkeypatch
) -> None:
    """Neither this machine's GPU nor its packages count."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("this machine was asked"))
    for module in (transformer_engine, torchao):
        monkeypatch.setattr(module, "_failure", lambda chosen: pytest.fail("this machine was asked"))
    found = {}
    for chosen in expected:
        layers = nn.ModuleDict({"linear": Linear(128, 256), "experts": GroupedLinear(4, 128, 256, top_k=2)})
        rules = [PrecisionRule(pattern="*", format=chosen)]
        assign_formats(PrecisionConfig(recipe=None, rules=rules), layers, "cuda", capability)
        (found[chosen],) = {scheme.backend.name for scheme in quantized_schemes(layers).values()}
    assert found == expected


def test_torchao_is_the_second_choice_of_a_gpu_elsewhere() -> None:
    arithmetic = Arithmetic()
    assert TorchAO().refusal(uniform("nvfp4"), arithmetic, SIZES, "cuda", (10, 0)) == ""
    reason = "nvfp4 needs a GPU of compute capability 10.0"
    assert TorchAO().refusal(uniform("nvfp4"), arithmetic, SIZES, "cuda", (9, 0)) == reason


def test_a_backend_that_a_gpu_elsewhere_lacks_is_a_named_error() -> None:
    config = PrecisionConfig(backend="transformer_engine")
    with pytest.raises(ValueError, match=r"in nvfp4 there: nvfp4 needs a GPU of compute capability 10\.0"):
        assign_formats(config, network(), "cuda", (9, 0))


@pytest.mark.parametrize("chosen", ["fp8", "mxfp8"])
def test_torchao_computes_the_same_where_it_emulates(chosen: str) -> None:
    """The call of the backend, in torchao's own emulation, against ours; 60 rows are filled up."""
    pytest.importorskip("torchao")
    found = []
    for backend in (TorchAO(emulate=True), EMULATED):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(3, 20, 64, generator=generator).bfloat16().requires_grad_()
        weight = torch.randn(96, 64, generator=generator).bfloat16().requires_grad_()
        y = backend.linear(x, weight, Scheme(uniform(chosen), Arithmetic(), backend))
        y.backward(torch.randn(y.shape, generator=generator).bfloat16())
        found.append((y, x.grad, weight.grad))
    for name, theirs, ours in zip(("y", "dx", "dW"), *found, strict=True):
        assert_close(theirs, ours, 2**-7, name)


# ------------------------------------------------------------------------ Transformer Engine runs on NVIDIA GPUs only


class Engine:
    """A stand-in that multiplies in bf16 and notes what it is asked for."""

    def __init__(self) -> None:
        self.recipes: list[tuple[str, dict]] = []
        self.rows: list[object] = []
        engine = self

        class TheirLinear(nn.Module):
            def __init__(self, in_features: int, out_features: int, *, bias, params_dtype, device) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))

            def forward(self, x: Tensor) -> Tensor:
                engine.rows.append(len(x))
                return x @ self.weight.T

        class TheirGroupedLinear(nn.Module):
            def __init__(self, count: int, in_features: int, out_features: int, *, bias, params_dtype, device) -> None:
                super().__init__()
                for number in range(count):
                    weight = torch.empty(out_features, in_features, dtype=params_dtype, device=device)
                    self.register_parameter(f"weight{number}", nn.Parameter(weight))

            def forward(self, x: Tensor, rows: list[int]) -> Tensor:
                engine.rows.append(rows)
                parts = x.split(rows)
                return torch.cat([part @ getattr(self, f"weight{number}").T for number, part in enumerate(parts)])

        self.Linear, self.GroupedLinear = TheirLinear, TheirGroupedLinear

    def recipe(self, name: str):
        return lambda **options: (name, options)

    @contextlib.contextmanager
    def autocast(self, enabled: bool, recipe: tuple[str, dict]):
        assert enabled
        self.recipes.append(recipe)
        yield


@pytest.fixture
def engine(monkeypatch) -> Engine:
    made = Engine()
    modules = {name: ModuleType(name) for name in ("", ".pytorch", ".common", ".common.recipe")}
    vars(modules[".pytorch"]).update(Linear=made.Linear, GroupedLinear=made.GroupedLinear, autocast=made.autocast)
    for chosen in ("fp8", "mxfp8", "nvfp4"):
        reason = "" if chosen == "fp8" else "compute capability 10.0 or higher required"
        answer = (not reason, reason)
        setattr(modules[".pytorch"], f"is_{chosen}_available", lambda return_reason, answer=answer: answer)
    for name in ("Float8CurrentScaling", "MXFP8BlockScaling", "NVFP4BlockScaling"):
        setattr(modules[".common.recipe"], name, made.recipe(name))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"transformer_engine{name}", module)
    transformer_engine._failure.cache_clear()
    yield made
    transformer_engine._failure.cache_clear()


def test_transformer_engine_is_chosen_where_it_has_the_format(engine: Engine, gpu) -> None:
    gpu((9, 0))
    backend = TransformerEngine()
    assert backend.refusal(uniform("fp8"), Arithmetic(), SIZES, "cuda") == ""
    assert backend.refusal(uniform("nvfp4"), Arithmetic(), SIZES, "cuda").startswith("compute capability 10.0")
    assert backend.refusal(uniform("fp8"), Arithmetic(), torch.Size((8, 24, 64)), "cuda").startswith("fp8 needs sizes")
    assert backend.refusal(uniform("fp8"), Arithmetic(), SIZES, "cpu") == "no CUDA device"


def test_a_switch_of_one_pass_alone_needs_emulation(engine: Engine, gpu) -> None:
    gpu((9, 0))
    layers = nn.ModuleDict({"linear": Linear(64, 64)})
    for switches, expected in (([], "transformer_engine"), ([FormatSwitch(at_tokens=1)], "transformer_engine")):
        assign_formats(PrecisionConfig(recipe=None, rules=FP8, switches=switches), layers, **ON_A_GPU)
        assert layers["linear"].product.backend.name == expected
    switches = [FormatSwitch(at_tokens=1, products="forward")]
    assign_formats(PrecisionConfig(recipe=None, rules=FP8, switches=switches), layers, **ON_A_GPU)
    assert layers["linear"].product.backend is EMULATED
    assert layers["linear"].product.refused["torchao"].startswith("it computes all three products")


def test_transformer_engine_computes_with_our_weights(engine: Engine) -> None:
    backend = TransformerEngine()
    scheme = Scheme(uniform("nvfp4"), Arithmetic(hadamard=False), backend)
    module = Linear(64, 32)
    nn.init.normal_(module.weight)
    module.format, module.product = "nvfp4", scheme
    x = torch.randn(3, 5, 64).bfloat16().requires_grad_()
    out = module(x)
    out.sum().backward()
    assert torch.equal(out, x @ module.weight.bfloat16().T)
    assert module.weight.grad.dtype == torch.float32
    assert_close(module.weight.grad, x.detach().float().sum((0, 1)).expand(32, 64), 2**-7)
    switches = {"disable_rht": True, "disable_stochastic_rounding": False, "disable_2d_quantization": False}
    assert engine.recipes == [("NVFP4BlockScaling", switches)]
    assert engine.rows == [32], "15 rows are filled up"


def test_transformer_engine_computes_experts(engine: Engine) -> None:
    backend = TransformerEngine()
    module, plain = GroupedLinear(3, 64, 32), GroupedLinear(3, 64, 32)
    nn.init.normal_(module.weight)
    plain.load_state_dict(module.state_dict())
    module.format, module.product, plain.format = "mxfp8", Scheme(uniform("mxfp8"), Arithmetic(), backend), "bf16"
    x, offsets = torch.randn(50, 64).bfloat16(), torch.tensor([5, 5, 50], dtype=torch.int32)
    found = []
    for chosen in (module, plain):
        rows = x.clone().requires_grad_()
        out = chosen(rows, offsets)
        out.float().square().sum().backward()
        found.append((out, rows.grad, chosen.weight.grad))
    for name, theirs, ours in zip(("y", "dx", "dW"), *found, strict=True):
        assert_close(theirs, ours, 2**-7, name)
    assert engine.recipes == [("MXFP8BlockScaling", {})]
    assert engine.rows == [[32, 0, 64]]


def test_products_in_bf16_are_plain_whatever_the_backend() -> None:
    """After a switch to bf16; other people's kernels have no such product."""
    generator = torch.Generator().manual_seed(0)
    x, offsets = torch.randn(6, 32, generator=generator), torch.tensor([4, 6], dtype=torch.int32)
    linear, grouped = Linear(32, 16), GroupedLinear(2, 32, 16)
    for module in (linear, grouped):
        module.weight.data.normal_(generator=generator)
        module.format, module.product = "nvfp4", Scheme(uniform("bf16"), Arithmetic(), TorchAO())
    low = x.bfloat16()
    assert torch.equal(linear(x), F.linear(low, linear.weight.bfloat16()))
    expected = [
        F.linear(rows, weight.bfloat16()) for rows, weight in zip((low[:4], low[4:]), grouped.weight, strict=True)
    ]
    torch.testing.assert_close(grouped(x, offsets), torch.cat(expected))
