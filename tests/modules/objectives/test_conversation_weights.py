"""What a target of a conversation counts, against loops and values worked out by hand."""

import pytest
import torch
from torch import Tensor

from modules.batch import ConversationBatch, target_positions
from modules.objectives.next_token import LossAverage, conversation_weights, loss_weights, next_token_loss
from tests.modules.helpers import (
    assert_close,
    assert_same_gradients,
    conversations,
    document_ids,
    gradients,
    make_network,
    spans,
    tiny_config,
)


def targets(batch: ConversationBatch, depth: int) -> list[list[tuple[int, int]]]:
    """(row, position) of the targets of a depth, conversation by conversation; those without one are left out."""
    found = []
    for row, part in spans(batch.document_ids):
        labels = batch.labels[row].tolist()
        own = [(row, t) for t in range(part.start, part.stop - depth) if labels[t + depth] != -100]
        found += [own] if own else []
    return found


def mean_by_loop(nats: Tensor, batch: ConversationBatch, depth: int, average: LossAverage) -> Tensor:
    """The mean that a user has in mind, of nats [B, T] of a depth."""
    total, whole = torch.zeros(()), 0.0
    for own in targets(batch, depth):
        row, t = own[0]
        weight = batch.loss_weights[row, t + depth].item()
        terms = torch.stack([nats[place] for place in own])
        total = total + weight * (terms.mean() if average == "conversations" else terms.sum())
        whole += weight * (1 if average == "conversations" else len(own))
    return total / whole if whole else total


@pytest.mark.parametrize("average", ["tokens", "conversations"])
@pytest.mark.parametrize(("depths", "picked"), [(0, False), (1, True), (2, True), (2, False)])
def test_loss_and_gradients_equal_a_loop(average: LossAverage, depths: int, picked: bool) -> None:
    network = make_network(tiny_config(hybrid_override_pattern="M*"))
    batch = conversations(document_ids([1, 2, 5, 8], [12, 4]), seed=3)
    if picked:
        batch.positions = target_positions(batch.labels, batch.document_ids, depths)
    weights = conversation_weights(batch, depths, average)
    totals = weights.flatten(1).sum(1)
    parts = next_token_loss(network, batch, totals, depths, 0.3, weights)
    parts.loss.backward()
    ours = gradients(network)
    network.zero_grad()

    output = network(batch.tokens, batch.document_ids, depths)
    means = []
    for depth, hidden in enumerate([output.hidden, *output.mtp_hidden]):
        log = network.logits(hidden).log_softmax(-1)
        labels = torch.nn.functional.pad(batch.labels[:, depth:], (0, depth)).clamp(min=0)
        means.append(mean_by_loop(-log.gather(2, labels.unsqueeze(2)).squeeze(2), batch, depth, average))
    expected = means[0] + sum(0.3 / depths * mean for mean in means[1:])
    expected.backward()
    assert_close(parts.loss, expected, 1e-5, "loss")
    assert_close(parts.nats / totals, torch.stack(means), 1e-5, "means")
    assert_same_gradients(ours, gradients(network), 1e-4)


def test_values_worked_out_by_hand() -> None:
    """Two conversations in a row, one of 3 supervised tokens and weight 1, one of 1 and weight 0.5; then padding."""
    batch = ConversationBatch(
        tokens=torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 0, 0]]),
        labels=torch.tensor([[-100, 3, 4, 5, -100, 7, -100, -100, -100, -100]]),
        document_ids=torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 10, 10]], dtype=torch.int32),
        loss_weights=torch.tensor([[0.0, 1, 1, 1, 0, 0.5, 0, 0, 0, 0]]),
    )
    tokens, means = (conversation_weights(batch, 2, average) for average in ("tokens", "conversations"))
    assert tokens[0, 0].tolist() == [0, 1, 1, 1, 0, 0.5, 0, 0, 0, 0]
    assert tokens[1, 0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert tokens[2, 0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0], "one target is too near the beginning"
    assert means[0, 0].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0, 0.5, 0, 0, 0, 0])
    assert means[1, 0].tolist() == pytest.approx([1 / 3] * 3 + [0] * 7)
    assert means[2, 0].tolist() == pytest.approx([1 / 2] * 2 + [0] * 8)
    nats = torch.tensor([[0.0, 3, 6, 9, 0, 2, 0, 0, 0, 0]])
    totals = torch.stack([weights.flatten(1).sum(1) for weights in (tokens, means)])
    assert totals.tolist() == [[3.5, 3, 2], pytest.approx([1.5, 1, 1])]
    first, second = (
        loss_weights(weights, total, 0.3)[0] for weights, total in zip((tokens, means), totals, strict=True)
    )
    assert (first * nats).sum().item() == pytest.approx((3 + 6 + 9 + 0.5 * 2) / 3.5)
    assert (second * nats).sum().item() == pytest.approx((1 * 6 + 0.5 * 2) / 1.5)


def test_a_step_of_light_conversations_weighs_as_much_as_one_of_heavy_ones() -> None:
    """Weights below 1 in a step of few targets: the sum of the weights may be below 1."""
    batch = conversations(document_ids([4]), seed=0, masked=0.0)
    losses = []
    for factor in (1.0, 0.01):
        batch.loss_weights *= factor
        weights = conversation_weights(batch, 0, "tokens")
        losses.append(loss_weights(weights, weights.flatten(1).sum(1), 0.0).sum().item())
    assert losses == pytest.approx([1.0, 1.0])
