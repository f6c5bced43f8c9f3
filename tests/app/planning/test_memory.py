"""Memory counted on the meta device against what torch's MemTracker counts over real steps on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from app.planning import memory
from app.planning.memory import StepMemory, measure_rows, measure_step, shorten
from app.strategies import ShardedStrategy
from modules.backbone.initialization import initialize
from modules.optim.clipping import clip_gradients
from modules.precision.recipe import PrecisionConfig
from modules.pretraining import Pretraining
from tests.modules.helpers import BF16, FP32, document_ids, make_module, packed_batch, tiny_config

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "hybrid_override_pattern": "ME*-",
    "mamba_head_dim": 16,
    "ssm_state_size": 32,
    "chunk_size": 32,
    "head_dim": 16,
    "moe_intermediate_size": 48,
    "moe_latent_size": 32,
}
NVFP4 = PrecisionConfig(bf16_tail=0)
CASES = {
    "fp32": ({}, FP32, False, [[256]]),
    "bf16": ({}, BF16, False, [[256]]),
    "rows_checkpointed": ({}, BF16, True, [[96]] * 2),
    "documents": ({}, BF16, False, [[60, 28], [1, 60, 27], [88]]),
    "documents_checkpointed": ({}, FP32, True, [[100, 28], [1, 60, 67]]),
    "odd_length": ({}, FP32, False, [[131]]),
    "no_mtp": ({"hybrid_override_pattern": "*M", "num_nextn_predict_layers": 0}, FP32, False, [[200]]),
    "no_latent": ({"moe_latent_size": None, "moe_shared_expert_intermediate_size": 0}, FP32, False, [[64]]),
    "unaligned_experts": ({"moe_latent_size": 30, "moe_intermediate_size": 41}, BF16, False, [[64]]),
    "tied": ({"tie_word_embeddings": True}, FP32, False, [[64]]),
    "large_vocabulary": ({"vocab_size": 30_000}, FP32, True, [[200]]),
    "short": ({}, FP32, False, [[8]]),
    "nvfp4": ({}, NVFP4, False, [[100]]),
    "nvfp4_checkpointed": ({}, NVFP4, True, [[60, 28]]),
}
TOLERANCE = 0.005
Sync = Literal["last", "every"]


class Tracker(MemTracker):
    """MemTracker without the peaks of single modules, which take nearly all of its time."""

    def _update_peak_stats(self, peak_state) -> None:
        for device, snapshot in self._curr_mem_snap.items():
            self._peak_mem[device] = max(self._peak_mem.get(device, 0), snapshot["Total"])

    @property
    def peak(self) -> int:
        return self._peak_mem[torch.device("cpu")]


def stage(case: str) -> tuple[Pretraining, list[list[int]]]:
    changes, recipe, checkpointed, documents = CASES[case]
    config = tiny_config(**SIZES | changes)
    depths = 2 * config.num_nextn_predict_layers
    options = {"precision": recipe, "activation_checkpointing": checkpointed, "mtp_depths": depths}
    return make_module(config, **options), documents


def peaks(
    module: Pretraining,
    documents: list[list[int]],
    micro_batches: int = 1,
    sharded: ShardedStrategy | None = None,
    tracker=Tracker,
) -> list[int]:
    """Peaks in bytes over the first real step, and over the first two."""
    network = module.build_network().train()
    if sharded is not None:
        sharded.shard(network)
    network.to_empty(device="cpu")
    network.tie_weights()
    initialize(network, 0)
    module.network = network
    optimizer = module.configure_optimizers()
    vocabulary = module.backbone_config.vocab_size
    window = [packed_batch(document_ids(*documents), vocabulary, seed) for seed in range(micro_batches)]
    totals = {name: value.float() for name, value in module.count(window[0]).items()}
    counted, found = tracker(), []
    counted.track_external(network, *(tensor for batch in window for tensor in batch.tensors().values()))
    with counted:
        for _ in range(2):
            for batch in window:
                if sharded is not None:
                    sharded.sync_gradients(network, batch is window[-1])
                loss = module.micro_batch_loss(batch, totals).loss
                loss.backward()
                del loss
                counted.reset_mod_stats()
            clip_gradients(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(counted._peak_mem[torch.device("cpu")])
    return found


def assert_same_peaks(planned: StepMemory, counted: list[int]) -> None:
    assert planned.first_peak == pytest.approx(counted[0], rel=TOLERANCE)
    assert planned.peak == pytest.approx(counted[1], rel=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_a_step_holds_what_mem_tracker_counts(case: str) -> None:
    module, documents = stage(case)
    assert_same_peaks(measure_step(module, documents), peaks(module, documents))


@pytest.mark.parametrize("case", ["bf16", "documents_checkpointed"])
def test_a_long_row_follows_from_shorter_ones(case: str, monkeypatch) -> None:
    module, _ = stage(case)
    whole = measure_rows(module, 1, 16_000)
    monkeypatch.setattr(memory, "LONGEST_RUN", 8192)
    grown = measure_rows(module, 1, 16_000)
    for name, size in vars(grown).items():
        assert size == pytest.approx(getattr(whole, name), rel=0.02), name


@pytest.mark.parametrize("case", ["bf16", "documents_checkpointed"])
def test_accumulation_keeps_the_gradients(case: str) -> None:
    module, documents = stage(case)
    assert_same_peaks(measure_step(module, documents, micro_batches=2), peaks(module, documents, micro_batches=2))


def test_the_quick_tracker_counts_as_mem_tracker_does() -> None:
    module, documents = stage("no_mtp")
    assert peaks(module, documents) == peaks(module, documents, tracker=MemTracker)


@contextmanager
def fake_ranks(devices: int, sync: Sync = "last") -> Iterator[ShardedStrategy]:
    """Our layout over devices that exist only in name; what a rank holds is real."""
    dist.init_process_group("fake", rank=0, world_size=devices, store=FakeStore())
    strategy = ShardedStrategy(sync)
    strategy.make_mesh("cpu")
    try:
        yield strategy
    finally:
        dist.destroy_process_group()


SHARDED_CASES = ["bf16", "documents_checkpointed", "tied", "large_vocabulary", "short"]


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("case", SHARDED_CASES)
def test_a_rank_of_fsdp2_holds_what_mem_tracker_counts(case: str, devices: int) -> None:
    module, documents = stage(case)
    planned = measure_step(module, documents, strategy=ShardedStrategy(), devices=devices)
    with fake_ranks(devices) as sharded:
        assert_same_peaks(planned, peaks(module, documents, sharded=sharded))


@pytest.mark.parametrize("micro_batches", [2, 3, 4])
@pytest.mark.parametrize("sync", ["last", "every"])
def test_gradients_are_whole_until_they_are_summed(sync: Sync, micro_batches: int) -> None:
    module, documents = stage("bf16")
    planned = measure_step(module, documents, micro_batches, ShardedStrategy(sync), 4)
    with fake_ranks(4, sync) as sharded:
        assert_same_peaks(planned, peaks(module, documents, micro_batches, sharded))


LONG = {"hybrid_override_pattern": "MEMEMEM*EMEMEMEM*EME", "mtp_hybrid_override_pattern": "*E"}
WHOLE = {
    "one process": (BF16, "last", 1, 1, "MEMEM*EMEMEM*EMEM-ME"),
    "summed with the last": (BF16, "last", 3, 4, LONG["hybrid_override_pattern"]),
    "summed with each": (PrecisionConfig(bf16_tail=0.2), "every", 2, 4, LONG["hybrid_override_pattern"]),
    "runs of a kind": (FP32, "last", 1, 4, "MMMMMMEEEEEE****--M"),
    "one kind": (BF16, "every", 2, 2, "M" * 12),
}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("case", WHOLE)
def test_layers_of_a_kind_stand_for_each_other(case: str, checkpointed: bool) -> None:
    recipe, sync, micro_batches, devices, letters = WHOLE[case]
    config = tiny_config(**SIZES | {"hybrid_override_pattern": letters})
    module = make_module(config, precision=recipe, activation_checkpointing=checkpointed, mtp_depths=2)
    arguments = module, [[40, 24]], micro_batches, ShardedStrategy(sync), devices
    assert measure_step(*arguments) == measure_step(*arguments, whole=True)


def test_few_layers_of_a_long_network_run() -> None:
    layers = [*make_module(tiny_config(hybrid_override_pattern="ME" * 40 + "*")).build_network().backbone.layers]
    left, repeats = shorten(layers)
    assert len(left) <= 10
    assert [layers[left[place]].letter for place in repeats] == [layer.letter for layer in layers]


def test_parts_by_hand() -> None:
    module, documents = stage("short")
    network = module.build_network()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    measured = measure_step(module, documents)
    assert measured.weights == 4 * parameters + sum(4 * buffer.numel() for buffer in network.buffers())
    assert measured.gradients == 4 * parameters
    assert measured.optimizer == 8 * parameters + 4 * len([*network.parameters()]), "two moments and a step count"
    assert measured.batch == 8 * (8 + 4 + 8)
    shared = measure_step(module, documents, strategy=ShardedStrategy(), devices=4)
    assert shared.weights - (measured.weights - 4 * parameters) == pytest.approx(parameters, rel=0.01)
    assert shared.gathered_peak > 0 == measured.gathered_peak


def test_measuring_leaves_the_module_as_it_was() -> None:
    module, documents = stage("short")
    before = dict(vars(module))
    measure_step(module, documents)
    assert dict(vars(module)) == {**before, "precision_table": module.precision_table}


def test_less_is_kept_with_checkpointing() -> None:
    kept = {}
    for checkpointed in (False, True):
        module, _ = stage("bf16")
        module.activation_checkpointing = checkpointed
        kept[checkpointed] = [measure_step(module, [[length]]).kept for length in (64, 128)]
    assert kept[True][1] < 0.5 * kept[False][1]
    assert kept[False][1] > 1.5 * kept[False][0]
