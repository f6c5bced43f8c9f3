"""The training step of pretraining: windows, accumulation, learning rate, logging, validation."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers.logger import DummyLogger

from modules.batch import IGNORED_LABEL, PackedBatch
from modules.errors import UserError
from modules.optim.adamw import OptimizerConfig
from modules.optim.schedule import ScheduleConfig
from tests.modules.helpers import (
    Collector,
    ListData,
    assert_close,
    build,
    counts_of,
    document_ids,
    fit,
    make_module,
    make_trainer,
    network_state,
    packed_batch,
    row_batches,
    tiny_config,
)

LENGTH = 16
DEPTHS = 2


def joined(batches: list[PackedBatch]) -> PackedBatch:
    """The rows as one micro-batch."""
    tensors = {name: torch.cat([vars(batch)[name] for batch in batches]) for name in ("tokens", "labels")}
    ids = torch.cat([batch.document_ids for batch in batches])
    return PackedBatch(**tensors, document_ids=ids)


@pytest.mark.parametrize("sizes", [(1, 8), (2, 4), (4, 2)])
def test_accumulation_equals_one_large_batch(sizes: tuple[int, int]) -> None:
    """Several AdamW steps over the same rows, cut into micro-batches in two ways, with uneven targets."""
    size, window = sizes
    windows = [row_batches(24)[start : start + 8] for start in (0, 8, 16)]
    assert len({counts_of(batch, 0).item() for batch in windows[0]}) > 4, "uneven"
    results = []
    for cut in (8, size):
        batches = [joined(group[start : start + cut]) for group in windows for start in range(0, 8, cut)]
        module = make_module(
            optimizer=OptimizerConfig(learning_rate=3e-3, epsilon=1e-4), auxiliary_loss_coefficient=0.1
        )
        collector = Collector()
        fit(module, ListData(batches, window=8 // cut), callbacks=[collector])
        results.append((network_state(module), collector.steps))
    (large, large_steps), (small, small_steps) = results
    assert len(large_steps) == len(small_steps) == 3
    for expected, actual in zip(large_steps, small_steps, strict=True):
        assert actual == pytest.approx(expected, rel=1e-4)
    for name, tensor in large.items():
        if name.endswith("e_score_correction_bias"):
            assert tensor.any()
            assert torch.equal(small[name], tensor), name
        else:
            assert_close(small[name], tensor, 1e-4, name)
    assert window * size == 8


def test_the_update_is_that_of_a_plain_loop() -> None:
    """Two steps of two micro-batches against a loop with full logits, torch's clipping and torch's AdamW."""
    batches = row_batches(4)
    config = tiny_config()
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-4, "weight_decay": 0.0}
    module = make_module(
        config,
        optimizer=OptimizerConfig(learning_rate=1e-2, epsilon=1e-4, weight_decay=0.0, gradient_clip_norm=0.5),
        auxiliary_loss_coefficient=0.0,
        expert_bias_rate=0.01,
        seed=0,
    )
    collector = Collector()
    fit(module, ListData(batches, window=2), callbacks=[collector])

    reference = make_module(config, seed=0)
    network = build(reference)
    optimizer = torch.optim.AdamW(network.parameters(), **settings, foreach=False, fused=False)
    for step in range(2):
        window = joined(batches[2 * step : 2 * step + 2])
        optimizer.zero_grad()
        output = network(window.tokens, window.document_ids, DEPTHS)
        parts = []
        for depth, hidden in enumerate([output.hidden, *output.mtp_hidden]):
            labels = window.labels[:, depth:].clone()
            labels[window.document_ids[:, depth:] != window.document_ids[:, : LENGTH - depth]] = -100
            parts.append(F.cross_entropy(network.logits(hidden)[:, : LENGTH - depth].flatten(0, 1), labels.flatten()))
        loss = parts[0] + 0.3 / DEPTHS * (parts[1] + parts[2])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
        for router, routing in zip(network.routers(), output.router, strict=True):
            load = routing.counts.sum(0).float()
            router.e_score_correction_bias += 0.01 * torch.sign(load.mean() - load)
        expected = {
            "training/loss": loss.item(),
            "training/next_token_loss": parts[0].item(),
            "training/mtp_loss_1": parts[1].item(),
            "training/mtp_loss_2": parts[2].item(),
            "training/gradient_norm": norm.item(),
            "training/learning_rate": 1e-2,
            "training/skipped_steps": 0.0,
        }
        assert collector.steps[step] == pytest.approx(expected, rel=1e-4)
    for name, tensor in network.state_dict().items():
        assert_close(module.built_network.state_dict()[name], tensor, 1e-3, name)


def test_the_head_computes_targets_only_where_few_positions_have_one(monkeypatch) -> None:
    """Step 1 has few, step 2 nearly all (they are all computed), validation has few."""
    few, many = packed_batch(document_ids([16]), 64, masked=0.8), packed_batch(document_ids([16] * 3), 64)
    many.labels.fill_(5)
    module, seen = make_module(config=tiny_config(num_nextn_predict_layers=0), mtp_depths=0), []

    class Spy(Collector):
        def on_train_start(self, trainer, pl_module) -> None:
            pl_module.built_network.lm_head.register_forward_pre_hook(
                lambda head, inputs, options: seen.append(options["positions"]), with_kwargs=True
            )

    fit(module, ListData([few, many], validation=[few]), callbacks=[Spy()])
    expected = (few.labels != -100).flatten().nonzero().flatten().tolist()
    assert 0 < len(expected) < 8
    assert [None if found is None else found.tolist() for found in seen] == [expected, None, expected]


def test_every_parameter_is_trained() -> None:
    module, untrained = make_module(), make_module()
    fit(module, ListData(row_batches(16), window=2))
    build(untrained)
    for name, tensor in network_state(untrained).items():
        assert not torch.equal(module.built_network.state_dict()[name], tensor), name


def test_the_auxiliary_loss_is_a_mean_over_rows_and_logged() -> None:
    batches, collectors = row_batches(4), []
    for coefficient in (0.0, 0.5):
        collectors.append(Collector())
        module = make_module(auxiliary_loss_coefficient=coefficient)
        fit(module, ListData(batches, window=4), callbacks=[collectors[-1]])
    without, with_it = (collector.steps[0] for collector in collectors)
    assert "training/auxiliary_loss" not in without
    # Three routers, each near 1 for nearly even scores and never below by much.
    assert 2.5 < with_it["training/auxiliary_loss"] < 12
    expected = without["training/loss"] + 0.5 * with_it["training/auxiliary_loss"]
    assert with_it["training/loss"] == pytest.approx(expected, rel=1e-5)


def test_without_mtp() -> None:
    batches = [packed_batch(document_ids([4, 12]), 64, seed=seed) for seed in range(3)]
    collector = Collector()
    fit(make_module(tiny_config(num_nextn_predict_layers=0), mtp_depths=0), ListData(batches), callbacks=[collector])
    assert not any("mtp" in name for name in collector.steps[0])
    assert all(math.isfinite(step["training/loss"]) for step in collector.steps)


def test_training_learns() -> None:
    batch = packed_batch(document_ids([16], [16]), 64)
    collector = Collector()
    fit(make_module(), ListData([batch] * 60), callbacks=[collector])
    assert collector.steps[0]["training/next_token_loss"] == pytest.approx(math.log(64), rel=0.3)
    assert collector.steps[-1]["training/next_token_loss"] < 0.5


def test_learning_rate_follows_the_tokens() -> None:
    schedule = ScheduleConfig(warmup_tokens=4 * LENGTH, decay_tokens=8 * LENGTH, minimum_ratio=0.1)
    collector = Collector()
    module = make_module(schedule=schedule, optimizer=OptimizerConfig(learning_rate=2e-3))
    fit(module, ListData(row_batches(20), window=2), callbacks=[collector])
    # Ten steps of two rows: tokens after the step over the warm-up, then 1, then the decay's last four steps.
    expected = [0.5, 1, 1, 1, 1, 1] + [0.1 + 0.9 * (1 - math.sqrt(share)) for share in (0.25, 0.5, 0.75, 1.0)]
    actual = [step["training/learning_rate"] for step in collector.steps]
    assert actual == pytest.approx([2e-3 * factor for factor in expected], rel=1e-6)


def test_a_schedule_longer_than_the_run_is_refused() -> None:
    module = make_module(schedule=ScheduleConfig(warmup_tokens=100 * LENGTH))
    with pytest.raises(UserError, match=r"model\.schedule"):
        fit(module, ListData(row_batches(2)))


class Memory(DummyLogger):
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics, step=None) -> None:
        self.rows.append((step, dict(metrics)))


def test_steps_are_logged_at_their_own_number_on_the_interval() -> None:
    logger, collector = Memory(), Collector()
    fit(make_module(), ListData(row_batches(12), window=2), logger=logger, log_every_n_steps=2, callbacks=[collector])
    points = [(step, row) for step, row in logger.rows if "training/loss" in row]
    assert [step for step, _ in points] == [2, 4, 6]
    for step, row in points:
        training = {name: value for name, value in row.items() if name.startswith("training/")}
        assert training == pytest.approx(collector.steps[step - 1])


def test_validation_loss_and_bits_per_byte() -> None:
    validation = row_batches(3)
    logger = Memory()
    module = make_module()
    data = ListData(row_batches(2), validation=validation)
    fit(module, data, logger=logger)
    nats, targets, text_bytes = 0.0, 0, 0
    with torch.no_grad():
        for batch in validation:
            logits = module.built_network.logits(module.built_network(batch.tokens, batch.document_ids).hidden)
            nats += F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum").item()
            kept = [label for label in batch.labels.flatten().tolist() if label != -100]
            targets += len(kept)
            text_bytes += sum(label % 5 for label in kept)
    expected = {
        "validation/loss": nats / targets,
        "validation/bits_per_byte": nats / math.log(2) / text_bytes,
    }
    step, row = next((step, row) for step, row in logger.rows if "validation/loss" in row)
    assert step == 2
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert {name: module.trainer.callback_metrics[name].item() for name in expected} == pytest.approx(
        expected, rel=1e-5
    )
    before = network_state(module)
    make_trainer(limit_val_batches=1.0).validate(module, data, verbose=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in network_state(module).items())


def test_validation_without_a_target_is_an_error_and_no_nan() -> None:
    [batch] = row_batches(1)
    batch.labels.fill_(IGNORED_LABEL)
    data = ListData(row_batches(1), validation=[batch])
    with pytest.raises(
        UserError, match=r"^data\.init_args\.validation_rows: the held-out rows have no token to predict"
    ):
        make_trainer(limit_val_batches=1.0).validate(make_module(), data, verbose=False)
    [batch] = data.validation = row_batches(1)
    batch.labels[batch.labels != IGNORED_LABEL] = 5  # a token that stands for no byte
    module = make_module()
    make_trainer(limit_val_batches=1.0).validate(module, data, verbose=False)
    assert module.metrics["validation/loss"] > 0
    assert "validation/bits_per_byte" not in module.metrics, "no bits per byte without a byte"
