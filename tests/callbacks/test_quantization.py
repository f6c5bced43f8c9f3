"""Health of training in few bits: a step against plain loops over what was multiplied, and warnings only when due."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from callbacks.operands import OPERANDS
from callbacks.quantization import QuantizationHealth, Watch, unseen_lines
from callbacks.step import curve_name
from callbacks.weights import DECAYED, PassingSteps, dead_line
from modules.backbone.initialization import initialize, local_rows
from modules.batch import IGNORED_LABEL, PackedBatch
from modules.errors import UserError
from modules.objectives.next_token import next_token_loss
from modules.precision.linear import GroupedLinear, Linear
from modules.precision.recipe import PrecisionConfig, quantized_schemes
from modules.precision.scheme import Products, Scheme
from modules.pretraining import Pretraining
from tests.callbacks.helpers import run
from tests.modules.helpers import (
    BF16,
    FP32,
    ListData,
    LocalStrategy,
    build,
    counts_of,
    document_ids,
    make_module,
    packed_batch,
    row_batches,
)

ROOT = Path(__file__).parent.parent.parent
NEAREST = PrecisionConfig(bf16_tail=0, stochastic_rounding=False)
"""The recipe of Super for all layers, without random numbers."""
RANDOM = PrecisionConfig(bf16_tail=0)
OURS = ("quantization/", "gradients/", "weights/")
QUANTIZED = [
    *(f"layer_0{layer}.{name}_proj" for layer in (0, 4) for name in ("in", "out")),
    *(f"layer_0{layer}.{name}_proj" for layer in (1, 5) for name in ("experts.up", "experts.down")),
    *(f"layer_0{layer}.shared_experts.{name}_proj" for layer in (1, 5) for name in ("up", "down")),
    *(f"layer_03.{name}_proj" for name in ("up", "down")),
]


class Recorder(Callback):
    """Keeps the operands, gradients, expert counts and weights of the first step."""

    def __init__(self) -> None:
        self.operands: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
        self.gradients: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        names = {scheme: curve_name(name) for name, scheme in quantized_schemes(pl_module.built_network).items()}

        def observe(scheme: Scheme, operand: str, before: Tensor, after: Tensor, bound: Tensor) -> None:
            self.operands.setdefault((names[scheme], operand), []).append((before.clone(), after.clone()))

        for scheme in names:
            scheme.arithmetic.observer = observe if trainer.global_step == 0 else None

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step == 0:
            self.gradients = {name: p.grad.clone() for name, p in pl_module.built_network.named_parameters()}
            self.weights = {name: p.detach().clone() for name, p in pl_module.built_network.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 1:
            self.counts = pl_module.expert_counts


def operands_by_loops(recorder: Recorder) -> dict[str, float]:
    values: dict[str, dict[str, float]] = {}
    for (module, operand), pairs in recorder.operands.items():
        nonzero = vanished = 0
        power = error = 0.0
        for before, after in pairs:
            for x, left in zip(before.double().flatten().tolist(), after.double().flatten().tolist(), strict=True):
                nonzero += x != 0
                vanished += x != 0 and left == 0
                power, error = power + x**2, error + (x - left) ** 2
        values.setdefault(f"quantization/underflow/{operand}", {})[module] = vanished / nonzero
        values.setdefault(f"quantization/snr_db/{operand}", {})[module] = 10 * math.log10(power / error)
    return summed_up(values)


def weights_by_loops(recorder: Recorder, network: nn.Module) -> dict[str, float]:
    values: dict[str, dict[str, float]] = {"gradients/zero_share": {}, "weights/decayed_channels": {}}
    mixtures = ["backbone.layers.1", "backbone.layers.5", "mtp.layers.1"]
    zeros = elements = idle = 0
    for name, module in network.named_modules():
        if not isinstance(module, Linear | GroupedLinear):
            continue
        gradient, weight = recorder.gradients[f"{name}.weight"], recorder.weights[f"{name}.weight"]
        if isinstance(module, GroupedLinear):
            tokens = recorder.counts[mixtures.index(name.split(".mixer")[0])].tolist()
            idle += sum(part.numel() for part, count in zip(gradient, tokens, strict=True) if not count)
            gradient = torch.stack([part for part, count in zip(gradient, tokens, strict=True) if count])
        flat = gradient.flatten().tolist()
        values["gradients/zero_share"][curve_name(name)] = flat.count(0.0) / len(flat)
        zeros, elements = zeros + flat.count(0.0), elements + len(flat)
        if name.endswith(("up_proj", "down_proj")):
            channels = weight if name.endswith("up_proj") else weight.mT
            norms = sorted(channels.norm(dim=-1).flatten().tolist())
            small = [norm for norm in norms if norm <= DECAYED * norms[(len(norms) - 1) // 2]]
            values["weights/decayed_channels"][curve_name(name)] = len(small) / len(norms)
    return summed_up(values) | {
        "gradients/zero_share/all": zeros / elements,
        "gradients/zero_share/without_tokens": idle / (idle + elements),
        "gradients/dead_weights": 0.0,
    }


def summed_up(values: dict[str, dict[str, float]]) -> dict[str, float]:
    curves = {}
    for name, modules in values.items():
        worst = min if "snr" in name else max
        curves |= {f"{name}/worst": worst(modules.values()), f"{name}/mean": sum(modules.values()) / len(modules)}
        curves |= {f"{name}/{module}": value for module, value in modules.items()}
    return curves


class Prepared(Pretraining):
    """Starts with dead channels, and experts 6 and 7 that no token reaches."""

    def configure_model(self) -> None:
        super().configure_model()
        with torch.no_grad():
            for layer in (1, 5):
                mixer = self.built_network.backbone.layers[layer].mixer
                mixer.gate.e_score_correction_bias[6:] = -100.0
                mixer.experts.up_proj.weight[2, :5] *= 1e-3
                mixer.shared_experts.down_proj.weight[:, 7] = 0.0


def ours(points: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in points.items() if name.startswith(OURS)}


@pytest.mark.parametrize(("window", "checkpointing"), [(1, False), (2, False), (2, True)])
def test_the_first_step_has_the_values_of_plain_loops(window: int, checkpointing: bool) -> None:
    """Rows end inside blocks, experts have few tokens; recomputed activations change no value."""
    batches = row_batches(window)
    settings = {"cls": Prepared, "precision": NEAREST, "expert_bias_rate": 0.0}
    recorder, module = Recorder(), make_module(**settings)
    run(module, ListData(batches, window), recorder)
    assert {len(pairs) for pairs in recorder.operands.values()} == {window}
    wanted = operands_by_loops(recorder) | weights_by_loops(recorder, module.built_network)
    watched = make_module(**settings, activation_checkpointing=checkpointing)
    found = ours(run(watched, ListData(batches, window), QuantizationHealth(1))[1])
    saturation = {name: found.pop(name) for name in [*found] if "/saturation/" in name}
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-9)
    assert wanted["weights/decayed_channels/layer_01.shared_experts.down_proj"] == 1 / 40
    assert wanted["gradients/zero_share/without_tokens"] > 0
    both = [f"{operand}/{end}" for operand in OPERANDS for end in ("worst", "mean")]
    assert set(saturation) == {f"quantization/saturation/{name}" for name in [*QUANTIZED, *both]}
    assert 0 < max(saturation.values()) < 0.03, "rows without a target have tiny gradients"


def test_points_are_those_of_the_interval_the_first_and_the_last_step() -> None:
    points = run(make_module(precision=RANDOM), ListData(row_batches(7)), QuantizationHealth(3))
    for name in ("quantization/underflow/fprop.x/worst", "gradients/zero_share/all", "weights/decayed_channels/worst"):
        assert [step for step, values in points.items() if name in values] == [1, 3, 6, 7], name


@pytest.mark.parametrize("precision", [RANDOM, BF16])
def test_looking_changes_nothing_and_ends_with_the_step(precision: PrecisionConfig) -> None:
    plain, watched = make_module(precision=precision), make_module(precision=precision)
    data = row_batches(4)
    without, with_health = run(plain, ListData(data, 2)), run(watched, ListData(data, 2), QuantizationHealth(1))
    for step, values in without.items():
        assert {name: with_health[step][name] for name in values} == values
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, watched.state_dict()[name]), name
    assert all(scheme.arithmetic.observer is None for scheme in quantized_schemes(watched.built_network).values())


@pytest.mark.parametrize("precision", [BF16, FP32])
def test_a_run_that_quantises_nothing_shows_its_weights_only(precision: PrecisionConfig) -> None:
    found = ours(run(make_module(precision=precision), ListData(row_batches(1)), QuantizationHealth(1))[1])
    assert {name.split("/")[0] for name in found} == {"gradients", "weights"}
    assert "gradients/zero_share/layer_01.experts.up_proj" in found


def test_a_product_that_is_switched_to_bf16_has_no_curve() -> None:
    module = make_module(precision=NEAREST)
    for scheme in quantized_schemes(build(module)).values():
        scheme.planned = Products("bf16", *scheme.planned[1:])
    found = ours(run(module, ListData(row_batches(1)), QuantizationHealth(1))[1])
    assert {name.split("/")[2] for name in found if "/snr_db/" in name} == set(OPERANDS[2:])


class Fading(Callback):
    """Makes the matrix behind a module so small in some steps that the gradient that reaches it underflows."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        weight = pl_module.built_network.backbone.layers[3].mixer.down_proj.weight
        with torch.no_grad():
            weight.copy_(self.first if trainer.global_step else weight)
            self.first = weight.clone()
            if trainer.global_step + 1 in self.steps:
                weight *= 1e-38


def warnings_of(text: str) -> list[str]:
    whole = text.replace("\n  ", " ")  # long lines are broken
    return [line for line in whole.splitlines() if line.startswith("warning: ")]


@pytest.mark.parametrize("precision", [RANDOM, BF16])
def test_a_gradient_that_underflows_is_named_once_until_it_is_back(precision: PrecisionConfig, capsys) -> None:
    """layer_03.down_proj has a gradient (its inputs are healthy), layer_03.up_proj none that bf16 can hold.

    Step 3 has no target: it says nothing of any weight.
    """
    module = make_module(precision=precision)
    batches = [packed_batch(document_ids([9, 7]), 64, seed, masked=float(seed == 2)) for seed in range(7)]
    points = run(module, ListData(batches), Fading({2, 3, 4, 6}), QuantizationHealth(1))
    assert warnings_of(capsys.readouterr().out) == [dead_line(step, ["layer_03.up_proj"]) for step in (2, 6)]
    assert [points[step]["gradients/dead_weights"] for step in range(1, 8)] == [0, 1, 0, 1, 0, 1, 0]
    assert points[2]["gradients/zero_share/layer_03.up_proj"] == points[2]["gradients/zero_share/worst"] == 1.0
    assert points[2]["gradients/zero_share/layer_03.down_proj"] < 1.0
    assert points[2]["training/skipped_steps"] == 0, "everything was finite"


@pytest.mark.parametrize(
    ("batch", "changes"),
    [
        (packed_batch(document_ids([16]), 64, masked=1.0), {}),  # no target at all
        (packed_batch(document_ids([1] * 14 + [2]), 64), {}),  # no target for the MTP block
        (packed_batch(document_ids([16]), 64), {"mtp_loss_factor": 0.0}),
        (packed_batch(document_ids([2] * 8), 64), {"cls": Prepared}),  # experts without a token
    ],
)
def test_zeros_that_must_be_are_no_warning(batch: PackedBatch, changes: dict, capsys) -> None:
    points = run(make_module(precision=RANDOM, **changes), ListData([batch]), QuantizationHealth(1))
    assert warnings_of(capsys.readouterr().out) == []
    assert points[1]["gradients/dead_weights"] == 0


def test_steps_between_points_are_not_forgotten(capsys) -> None:
    """Points at 1, 6 and 9: steps 3 and 4 fail, 5 has no target, 8 fails again."""
    batches = [packed_batch(document_ids([9, 7]), 64, seed, masked=float(seed == 4)) for seed in range(9)]
    points = run(make_module(precision=BF16), ListData(batches), Fading({3, 4, 5, 8}), QuantizationHealth(6))
    assert warnings_of(capsys.readouterr().out) == [dead_line(step, ["layer_03.up_proj"]) for step in (3, 8)]
    assert [step for step, values in points.items() if "gradients/dead_weights" in values] == [1, 6, 9]


class Silenced(Callback):
    """Takes all that the up projection of one expert learns, as a kernel that leaves it out would."""

    def __init__(self, expert: int, steps: set[int]) -> None:
        self.expert, self.steps = expert, steps

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.global_step + 1 in self.steps:
            pl_module.built_network.backbone.layers[5].mixer.experts.up_proj.weight.grad[self.expert] = 0.0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_single_expert_that_learns_nothing_is_named_once_until_its_gradient_is_back(checkpointing, capsys) -> None:
    module = make_module(precision=RANDOM, activation_checkpointing=checkpointing)
    batches = [packed_batch(document_ids([9, 7], [3, 13]), 64, seed) for seed in range(6)]
    points = run(module, ListData(batches), Silenced(2, {2, 3, 5}), QuantizationHealth(1))
    assert warnings_of(capsys.readouterr().out) == [dead_line(step, ["layer_05.experts.up_proj[2]"]) for step in (2, 5)]
    assert [points[step]["gradients/dead_weights"] for step in range(1, 7)] == [0, 1, 1, 0, 1, 0]


def test_an_expert_whose_tokens_are_asked_nothing_is_no_warning(capsys) -> None:
    """One target among 16 positions: in the last layer most experts have tokens, and rightly no gradient."""
    batch = packed_batch(document_ids([16]), 64, masked=0.95)
    assert batch.labels.ne(IGNORED_LABEL).sum() == 1
    module = make_module(precision=RANDOM, mtp_loss_factor=0.0, auxiliary_loss_coefficient=0.0)
    points = run(module, ListData([batch]), QuantizationHealth(1))
    busy = (module.expert_counts[1] > 0).sum()
    assert points[1]["gradients/zero_share/layer_05.experts.up_proj"] >= (busy - 2) / busy > 0.5
    assert points[1]["gradients/dead_weights"] == 0
    assert warnings_of(capsys.readouterr().out) == []


def test_a_frozen_weight_has_no_gradient_and_no_curve(capsys) -> None:
    module = make_module(precision=BF16)
    build(module).backbone.layers[2].mixer.o_proj.weight.requires_grad_(False)
    found = run(module, ListData(row_batches(2)), QuantizationHealth(1))[1]
    assert "gradients/zero_share/layer_02.v_proj" in found
    assert "gradients/zero_share/layer_02.o_proj" not in found
    assert warnings_of(capsys.readouterr().out) == []


def test_many_names_are_cut_short() -> None:
    assert re.fullmatch(r"warning: step 7: .*: a, b", dead_line(7, ["a", "b"]))
    assert dead_line(7, [f"m{i}" for i in range(30)]).endswith("m6, m7 and 22 more")


def test_what_other_backends_hide_is_said_once(capsys) -> None:
    class Hidden:
        name, shows_operands = "transformer_engine", False

    module = make_module(precision=NEAREST)
    schemes = [*quantized_schemes(build(module)).values()]
    assert unseen_lines(schemes) == []
    run(module, ListData(row_batches(2)), QuantizationHealth(1))
    assert "quantization_health" not in capsys.readouterr().out
    hidden = [Scheme(scheme.products, scheme.arithmetic, Hidden()) for scheme in schemes]  # type: ignore[arg-type]
    (line,) = unseen_lines([*hidden, schemes[0]])
    assert line.startswith("quantization_health: transformer_engine shows no operands")
    assert line.endswith(f" of its {len(QUANTIZED)} modules")


def test_intervals_below_one_are_refused() -> None:
    with pytest.raises(UserError, match=r"quantization_health\.every_n_steps is 0"):
        QuantizationHealth(every_n_steps=0)


RANKS_PROGRAM = """
import sys, torch, torch.distributed as dist
from types import SimpleNamespace
from torch.distributed.device_mesh import init_device_mesh
from app.strategies.sharded import AXES, ShardedStrategy
from tests.callbacks.test_quantization import watch_step
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + folder + "/store", rank=rank, world_size=2)
strategy = ShardedStrategy()
strategy._device_mesh = init_device_mesh("cpu", (1, 2, 1, 1), mesh_dim_names=AXES)
torch.save(watch_step([rank], strategy), f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def watch_step(seeds: list[int], strategy) -> list:
    """Watch forward and backward passes over a micro-batch for each seed, on a network with a decayed channel."""
    module = make_module(precision=NEAREST)
    module._trainer = SimpleNamespace(strategy=strategy)
    network = module.build_network()
    strategy.shard(network)
    network.to_empty(device="cpu")
    initialize(network, 0)
    up = network.backbone.layers[3].mixer.up_proj.weight
    local = up.detach().to_local() if isinstance(up, DTensor) else up.detach()
    local[[row % 7 == 0 for row in local_rows(up)]] = 0.0
    module.network, watch, counts = network, Watch(network), 0
    for seed in seeds:
        batch = packed_batch(document_ids([9, 7], [3, 13]), 64, seed)
        loss = next_token_loss(network, batch, 2 * counts_of(batch, 2), 2, 0.3)
        loss.loss.backward()
        counts = counts + torch.stack([routing.counts.sum(0) for routing in loss.output.router])
    module.expert_counts = strategy.all_reduce(counts)
    module.metrics["training/loss"] = strategy.all_reduce(loss.nats.sum())
    watch.look_at_weights(module)
    passing = PassingSteps(network)
    passing.look_at_gradients()
    passing.end_step(1, module)
    ((_, no_gradient, gradient),) = passing.read(module)
    return [*watch.end(module), no_gradient, gradient]


def test_two_ranks_see_what_one_sees_in_two_micro_batches(tmp_path) -> None:
    """Sharded weights and gradients, the same operands: on both ranks the values of the whole step."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS_PROGRAM, str(rank), str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        for rank in range(2)
    ]
    metrics, *names = watch_step([0, 1], LocalStrategy())
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert metrics["weights/decayed_channels/layer_03.up_proj"] == pytest.approx(7 / 48)
    for rank in range(2):
        others, *other_names = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert other_names == names
        assert others.keys() == metrics.keys()
        for name, value in metrics.items():
            few = 3e-3 if name.startswith("gradients/") else 1e-6  # FSDP2 sums those of the MTP depths in bf16
            assert others[name] == pytest.approx(value, rel=1e-5, abs=few), name
