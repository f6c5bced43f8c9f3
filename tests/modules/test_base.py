"""What all stages share: building the network, and skipping steps that are not finite."""

import math
from collections.abc import Mapping

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from modules.base import MicroBatchLoss, TrainingDivergedError
from modules.batch import PackedBatch, Progress
from modules.errors import UserError
from modules.optim.spikes import SpikeGuardConfig
from modules.pretraining import Pretraining
from tests.modules.helpers import (
    BF16,
    Collector,
    ListData,
    build,
    fit,
    make_module,
    make_network,
    network_state,
    perturb,
    row_batches,
    tiny_config,
)

GUARD = SpikeGuardConfig(window=4, minimum_steps=2)


class Poisoned(Pretraining):
    """Makes the loss, or only its gradient, of chosen micro-batches not finite, or a spike."""

    bad: frozenset[int] = frozenset()
    kind = "loss"
    seen = 0

    def micro_batch_loss(self, batch: PackedBatch, totals: Mapping[str, Tensor]) -> MicroBatchLoss:
        result = super().micro_batch_loss(batch, totals)
        self.seen += 1
        if self.seen - 1 not in self.bad:
            return result
        if self.kind == "loss":
            return result._replace(loss=result.loss * math.nan)
        if self.kind == "loss_spike":
            return result._replace(loss=result.loss * 1000)
        trap = self.built_network.backbone.norm_f.weight[0]
        if self.kind == "gradient_spike":
            return result._replace(loss=result.loss + 1e4 * (trap - trap.detach()))
        return result._replace(loss=result.loss + torch.sqrt((trap - trap.detach()).abs()))  # 0 with a gradient of nan


class Snapshots(Callback):
    """Copies of everything a step may change, before each step and after the last."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.take(pl_module)

    def on_train_end(self, trainer, pl_module) -> None:
        self.take(pl_module)

    def take(self, module: Pretraining) -> None:
        state = network_state(module)
        optimizer = module.trainer.optimizers[0]
        for name, parameter in module.built_network.named_parameters():
            state |= {f"{name}/{key}": value.clone() for key, value in optimizer.state.get(parameter, {}).items()}
        self.states.append(state)


@pytest.mark.parametrize("kind", ["loss", "gradient", "loss_spike", "gradient_spike"])
def test_a_skipped_step_changes_nothing_and_is_counted(kind: str) -> None:
    module = make_module(cls=Poisoned, spike_guard=GUARD)
    module.bad, module.kind = frozenset({3, 5}), kind
    snapshots, collector = Snapshots(), Collector()
    fit(module, ListData(row_batches(7)), callbacks=[snapshots, collector])
    assert [step["training/skipped_steps"] for step in collector.steps] == [0, 0, 0, 1, 1, 2, 2]
    for reason, name in (("loss_spike", "loss_spikes"), ("gradient_spike", "gradient_spikes")):
        counts = [step[f"training/skipped_{name}"] for step in collector.steps]
        assert counts == ([0, 0, 0, 1, 1, 2, 2] if kind == reason else [0] * 7)
    assert [step["training/skipped_not_finite"] for step in collector.steps][-1] == (0 if "spike" in kind else 2)
    assert module.skipped_steps.item() == 2
    assert module.skipped_streak.item() == 0
    assert module.trainer.global_step == 7
    for step in range(7):
        before, after = snapshots.states[step], snapshots.states[step + 1]
        changed = [name for name, tensor in after.items() if name in before and not torch.equal(before[name], tensor)]
        assert bool(changed) == (step not in module.bad), (step, changed)
        assert all(tensor.isfinite().all() for tensor in after.values())


def test_one_bad_micro_batch_skips_its_whole_window() -> None:
    module = make_module(cls=Poisoned)
    module.bad = frozenset({1})
    snapshots = Snapshots()
    fit(module, ListData(row_batches(4), window=2), callbacks=[snapshots])
    start, after_first, end = snapshots.states
    assert all(torch.equal(start[name], after_first[name]) for name in start)
    assert any(not torch.equal(start[name], end[name]) for name in start)
    assert module.skipped_steps.item() == 1


def test_a_streak_stops_the_run_naming_its_steps() -> None:
    module = make_module(cls=Poisoned, max_skipped_steps=3)
    module.bad = frozenset({0, 2, 3, 4, 5})
    with pytest.raises(TrainingDivergedError, match=r"in steps 3 to 5 \(model\.max_skipped_steps 3\)") as caught:
        fit(module, ListData(row_batches(8)))
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)
    assert module.trainer.global_step == 5


def test_a_streak_of_spikes_names_the_guard() -> None:
    module = make_module(cls=Poisoned, max_skipped_steps=3, spike_guard=GUARD)
    module.bad, module.kind = frozenset({3, 4, 5, 6}), "loss_spike"
    with pytest.raises(TrainingDivergedError, match=r"in steps 4 to 6 .* 3 loss spikes .* model\.spike_guard\.sigmas"):
        fit(module, ListData(row_batches(8)))


def test_without_a_guard_spikes_are_taken() -> None:
    module = make_module(cls=Poisoned)
    module.bad, module.kind = frozenset({4}), "loss_spike"
    collector = Collector()
    fit(module, ListData(row_batches(6)), callbacks=[collector])
    assert module.skipped_steps.item() == 0
    assert "training/loss_sigmas" not in collector.steps[-1]


def test_the_guard_goes_on_from_a_checkpoint_also_from_one_that_has_none() -> None:
    module, other = (make_module(spike_guard=GUARD) for _ in range(2))
    fit(module, ListData(row_batches(6)))
    checkpoint: dict = {}
    module.on_save_checkpoint(checkpoint)
    other.on_load_checkpoint({})
    assert other.step_guard.history.isnan().all()
    other.on_load_checkpoint(checkpoint)
    assert torch.equal(other.step_guard.history, module.step_guard.history)
    assert other.step_guard.history.isfinite().all()


def test_scattered_bad_steps_do_not_stop_the_run() -> None:
    module = make_module(cls=Poisoned, max_skipped_steps=2)
    module.bad = frozenset({0, 2, 4, 6})
    fit(module, ListData(row_batches(8)))
    assert module.skipped_steps.item() == 4


def test_the_counters_are_part_of_the_state() -> None:
    module = make_module()
    assert {"skipped_steps", "skipped_streak"} <= module.state_dict().keys()


def built(**changes) -> Pretraining:
    module = make_module(**changes)
    build(module)
    return module


def test_data_that_stand_elsewhere_than_the_run_are_refused() -> None:
    """A checkpoint of another datamodule: Lightning would restore nothing, and say nothing."""
    data = ListData(row_batches(4))
    data.progress = Progress(steps=2, tokens=32, samples=2)
    with pytest.raises(UserError, match=r"^data: the checkpoint is of step 0, ListData stands at 2; keep [^\n]*$"):
        fit(make_module(), data)


def test_building_needs_no_trainer_and_no_memory() -> None:
    module = make_module(precision=BF16)
    network = module.build_network()
    assert all(parameter.is_meta for parameter in network.parameters())
    assert {row[1] for row in module.precision_table} == {"bf16"}
    assert module.network is None


def test_configure_model_builds_once() -> None:
    module = built()
    network = module.built_network
    perturb(network)
    before = network_state(module)
    module.configure_model()
    assert module.built_network is network
    assert all(torch.equal(before[name], tensor) for name, tensor in network_state(module).items())


def test_the_seed_of_the_module_decides_the_weights() -> None:
    first, again, other = (network_state(built(seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_tied_head_stays_tied() -> None:
    module = built(config=tiny_config(tie_word_embeddings=True))
    network = module.built_network
    assert network.lm_head.weight is network.backbone.embeddings.weight
    assert "lm_head.weight" not in dict(network.named_parameters())


def test_weights_after_building_are_those_of_a_network_built_at_once() -> None:
    """Through the meta device or not: the same tensors under the same names."""
    module = built(seed=3)
    direct = make_network(tiny_config(), seed=3)
    matrices = [name for name, parameter in direct.named_parameters() if parameter.ndim >= 2]
    for name in matrices:
        assert torch.equal(module.built_network.get_parameter(name), direct.get_parameter(name)), name


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"mtp_depths": 0}, "model.mtp_depths"),
        ({"config": tiny_config(num_nextn_predict_layers=0)}, "model.mtp_depths"),
        ({"max_skipped_steps": 0}, "model.max_skipped_steps"),
    ],
)
def test_settings_that_contradict_are_one_line_naming_the_key(changes: dict, key: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}: [^\n]*$"):
        make_module(**changes)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused() -> None:
    build(make_module(), vocab_size=64)
    with pytest.raises(UserError, match=r"^model\.backbone\.vocab_size: [^\n]*65[^\n]*$"):
        build(make_module(), vocab_size=65)


def test_compiling_layers_is_refused_on_a_cpu() -> None:
    with pytest.raises(UserError, match=r"^model\.compile_layers: [^\n]*$"):
        built(compile_layers=True)
