"""Fine-tuning: packed = unpacked, accumulation = one batch, frozen routers, and what is told of it."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from modules.batch import ConversationBatch
from modules.errors import UserError
from modules.objectives.next_token import LossAverage
from modules.optim.adamw import OptimizerConfig
from modules.sft import SFT
from tests.modules.helpers import (
    Collector,
    ListData,
    assert_close,
    assert_same_gradients,
    build,
    conversations,
    document_ids,
    fit,
    gradients,
    make_module,
    make_trainer,
    network_state,
    perturb,
    spans,
)

AVERAGES: tuple[LossAverage, ...] = ("tokens", "conversations")
ROWS = [[16], [1, 15], [1] * 16, [4, 4, 8], [2, 2, 2, 10], [9, 7], [15, 1], [3, 13]]


def rows(seed: int = 0) -> list[ConversationBatch]:
    """Eight rows with very different numbers of conversations and of supervised tokens."""
    return [conversations(document_ids(row), 8 * seed + n, (0.2, 0.8)[n % 2]) for n, row in enumerate(ROWS)]


def joined(batches: list[ConversationBatch]) -> ConversationBatch:
    """The rows as one micro-batch."""
    names = batches[0].tensors()
    return ConversationBatch(**{name: torch.cat([batch.tensors()[name] for batch in batches]) for name in names})


def pieces(batch: ConversationBatch) -> Iterator[ConversationBatch]:
    """Each conversation as a row of its own."""
    for row, part in spans(batch.document_ids):
        tensors = {name: tensor[row : row + 1, part] for name, tensor in batch.tensors().items()}
        yield ConversationBatch(**{**tensors, "document_ids": torch.zeros_like(tensors["document_ids"])})


def loss_of(module: SFT, batches: list[ConversationBatch]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a step, and its gradients."""
    module.built_network.zero_grad()
    totals = module.totals(batches)
    loss = torch.stack([module.micro_batch_loss(batch, totals).loss for batch in batches]).sum()
    loss.backward()
    return loss, gradients(module.built_network)


@pytest.mark.parametrize("average", AVERAGES)
def test_packed_equals_unpacked(average: LossAverage) -> None:
    """In rows that hold several conversations, and padding, or one conversation a micro-batch."""
    module = make_module(cls=SFT, loss_average=average, auxiliary_loss_coefficient=0.0)
    perturb(build(module))
    packed = joined(rows())
    padding = packed.document_ids == torch.tensor([[0], [1], [15], [2], [3], [1], [1], [1]])  # the last of each row
    padding[0] = False
    packed.document_ids[padding], packed.labels[padding], packed.loss_weights[padding] = 16, -100, 0.0
    loss, grads = loss_of(module, [packed])
    alone, alone_grads = loss_of(module, list(pieces(packed)))
    assert_close(loss, alone, 1e-5, "loss")
    assert_same_gradients(grads, alone_grads, 1e-4)


@pytest.mark.parametrize("average", AVERAGES)
def test_accumulation_equals_one_batch(average: LossAverage) -> None:
    """Three AdamW steps over the same rows, eight at a time and one by one."""
    steps = [rows(seed) for seed in range(3)]
    results = []
    for window in (1, 8):
        batches = [joined(step) for step in steps] if window == 1 else [batch for step in steps for batch in step]
        optimizer = OptimizerConfig(learning_rate=3e-3, epsilon=1e-4)
        module = make_module(cls=SFT, loss_average=average, optimizer=optimizer, auxiliary_loss_coefficient=0.1)
        collector = Collector()
        fit(module, ListData(batches, window=window), callbacks=[collector])
        results.append((network_state(module), collector.steps))
    (large, large_steps), (small, small_steps) = results
    for expected, actual in zip(large_steps, small_steps, strict=True):
        assert actual == pytest.approx(expected, rel=1e-4)
    for name, tensor in large.items():
        assert_close(small[name], tensor, 1e-4, name)


def test_the_two_averages_differ_and_both_learn() -> None:
    batches = rows() * 6
    losses = []
    for average in AVERAGES:
        collector = Collector()
        fit(make_module(cls=SFT, loss_average=average), ListData(batches, window=8), callbacks=[collector])
        losses.append([step["training/next_token_loss"] for step in collector.steps])
    assert losses[0][0] != pytest.approx(losses[1][0], rel=1e-3)
    assert all(curve[-1] < 0.7 * curve[0] for curve in losses)


@pytest.mark.parametrize("average", AVERAGES)
def test_each_position_says_how_it_enters_the_loss(average: LossAverage) -> None:
    """`loss_weights` times the nats that the step tells add up to the loss without MTP and balance."""
    module = make_module(cls=SFT, loss_average=average, auxiliary_loss_coefficient=0.0, mtp_loss_factor=0.0)
    build(module)
    batches = rows()
    totals = module.totals(batches)
    weights = [module.loss_weights(batch, totals)[0] for batch in batches]
    parts = [module.micro_batch_loss(batch, totals) for batch in batches]
    losses = torch.stack([(weight * part.token_losses).sum() for weight, part in zip(weights, parts, strict=True)])
    assert_close(losses.sum(), torch.stack([part.loss for part in parts]).sum(), 1e-5)
    assert torch.stack([weight.sum() for weight in weights]).sum().item() == pytest.approx(1)


def test_validation_is_a_mean_under_the_weights_of_the_loss() -> None:
    held_out = rows(5)
    for average in AVERAGES:
        module = make_module(cls=SFT, loss_average=average)
        make_trainer(limit_val_batches=1.0).validate(module, ListData(rows(), validation=held_out), verbose=False)
        whole = joined(held_out)
        with torch.no_grad():
            logits = module.built_network.logits(module.built_network(whole.tokens, whole.document_ids).hidden)
            nats = F.cross_entropy(logits.transpose(1, 2), whole.labels, reduction="none")
        weights = module.target_weights(whole, 0)[0]
        assert module.metrics["validation/loss"].item() == pytest.approx(
            ((nats * weights).sum() / weights.sum()).item(), rel=1e-5
        )


def test_frozen_routers_stay_as_they_are() -> None:
    module = make_module(cls=SFT, freeze_router=True, expert_bias_rate=0.0)
    before = make_module(cls=SFT)
    build(before)
    fit(module, ListData(rows(), window=4))
    start, end = network_state(before), network_state(module)
    frozen = {name for name in start if ".gate." in name}
    assert len(frozen) == 6, "weight and bias of three routers"
    assert {name for name in start if torch.equal(start[name], end[name])} == frozen
    with pytest.raises(UserError, match=r"^model\.expert_bias_rate: 0\.001 .*set it to 0"):
        make_module(cls=SFT, freeze_router=True)
