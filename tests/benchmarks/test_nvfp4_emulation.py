"""The sides of the benchmark do the same work, and its tables are printed."""

import multiprocessing.dummy
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import nvfp4_emulation, nvfp4_linears, nvfp4_sides, nvfp4_steps, side, training_step
from benchmarks.nvfp4_sides import OURS, PLAIN, PORTABLE, TORCHAO
from modules.ops.native import quantization
from modules.precision import nvfp4
from modules.precision.linear import GroupedLinear, Linear
from tests.modules.helpers import dequantize_nvfp4, tiny_config


@pytest.fixture
def portable(monkeypatch: pytest.MonkeyPatch):
    """What a process of that side does."""
    return lambda: monkeypatch.setattr(quantization, "applies", lambda x: False)


def test_sides_agree(portable):
    for precision in nvfp4_emulation.DTYPES:
        x = nvfp4_emulation.matrix(precision, 128)
        ours, torchao = (nvfp4_emulation.functions_of(side)[""](x) for side in (OURS, TORCHAO))
        portable()
        assert torch.equal(ours, nvfp4_emulation.functions_of(PORTABLE)[""](x))
        assert ours.dtype == torchao.dtype
        assert torch.isclose(ours, torchao, rtol=1e-5, atol=0).float().mean() > 0.99


def test_every_use_gives_a_matrix():
    x = nvfp4_emulation.matrix("bf16", 64)
    functions = nvfp4_emulation.functions_of(OURS)
    assert set(functions) == {"", *nvfp4_emulation.USES}
    assert all(function(x).shape == x.shape for function in functions.values())


def outcomes(side: str, kind: str = "", size: int = 64) -> list[Tensor]:
    case = nvfp4_linears.Case(side, kind, size)
    return [*case.run("forward"), *case.run("both")]


def test_layers_of_all_sides_agree(portable):
    ours, torchao, plain = (outcomes(side) for side in (OURS, TORCHAO, PLAIN))
    portable()
    for name, mine, its, unquantised, slow in zip(
        ("y", "dx", "dW"), ours, torchao, plain, outcomes(PORTABLE), strict=True
    ):
        assert torch.equal(mine, slow), name
        assert nvfp4_linears.relative_difference(mine, its) < 0.01, name
        assert nvfp4_linears.relative_difference(unquantised, mine) > 0.05, name


def test_our_layer_is_differentiated_straight_through_its_rounding():
    case = nvfp4_linears.Case(OURS, "", 64)
    x, weight = (tensor.detach().double().requires_grad_() for tensor in (case.x, case.layer.weight))
    left = [dequantize_nvfp4(nvfp4.quantize(tensor.detach().bfloat16())).double() for tensor in (x, weight)]
    y = F.linear(*(t + (rounded - t).detach() for t, rounded in zip((x, weight), left, strict=True)))
    exact = [y, *torch.autograd.grad(y, (x, weight), case.gradient.double())]
    for name, mine, wanted in zip(("y", "dx", "dW"), outcomes(OURS), exact, strict=True):
        assert nvfp4_linears.relative_difference(mine, wanted) < 2**-8, name


def test_our_other_layers_round_what_they_say():
    narrow, tiles, every = (outcomes(OURS, kind) for kind in nvfp4_linears.KINDS)
    assert not torch.equal(narrow[0], tiles[0])
    assert torch.equal(narrow[2], tiles[2])
    assert torch.equal(tiles[0], every[0])
    assert not torch.equal(tiles[2], every[2])


def test_every_linear_is_quantised(monkeypatch):
    monkeypatch.setattr(training_step, "CONFIG", tiny_config())
    config, depths = training_step.models()["hybrid"]
    network = training_step.our_network(nvfp4_steps.EVERY, config)
    linears = {n: m for n, m in network.named_modules() if isinstance(m, Linear | GroupedLinear) and n != "lm_head"}
    assert len(linears) > 10
    assert {module.format for module in linears.values()} == {"nvfp4"}
    tokens = torch.randint(config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    losses = [float(training_step.our_step(recipe, tokens, config, depths)()) for recipe, _ in NOT_PORTABLE]
    assert len(set(losses)) == len(losses)
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-2)


NOT_PORTABLE = [row for row in nvfp4_steps.RECIPES.values() if row[1] == OURS]


def test_the_time_of_compilation():
    if quantization.load()[0] is None:
        pytest.skip(quantization.load()[1])
    assert nvfp4_sides.compilation_seconds() > 0.1


class Threads:
    """Stands in for processes, which take seconds to start."""

    Pipe = staticmethod(multiprocessing.dummy.Pipe)
    Process = threading.Thread


def test_the_tables(monkeypatch, capsys):
    monkeypatch.setattr(side.multiprocessing, "get_context", lambda kind: Threads)
    for module in (nvfp4_emulation, nvfp4_linears, nvfp4_steps):
        monkeypatch.setattr(module, "enter", lambda side, threads: None)
    monkeypatch.setattr(training_step, "CONFIG", tiny_config())
    monkeypatch.setattr(nvfp4_steps, "LENGTH", 32)
    monkeypatch.setattr(nvfp4_linears, "TOKENS", 64)
    monkeypatch.setattr(nvfp4_emulation, "compilation_seconds", lambda: 1.5)
    arguments = ["--models", "hybrid", "--sizes", "64", "--threads", "1", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["nvfp4_emulation", *arguments, "--sides", TORCHAO, PLAIN])
    nvfp4_emulation.main()
    out = capsys.readouterr().out
    quantiser, linear = out.split("linear layer 64 x 64")
    linear, step = linear.split("training step, hybrid model")
    assert "64 x 64 bf16, 1 thread(s)" in quantiser
    rows = {line.split("  ")[0]: line for line in quantiser.splitlines()}
    assert "100.00%" in rows["ours"]
    assert {"copy", TORCHAO} <= set(rows)
    rows = {line.strip().split("  ")[0]: line for line in linear.splitlines()}
    assert {OURS, "weight 16x16", "all three products", TORCHAO, PLAIN} <= set(rows)
    assert rows[OURS].endswith("0.00%   0.00%   0.00%")
    assert "ours against torchao, eager: forward" in linear
    assert "ceiling" in linear
    assert set(nvfp4_steps.RECIPES) <= {line.split("  ")[0] for line in step.splitlines()}
