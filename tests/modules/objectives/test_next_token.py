"""The pretraining loss against a loop over positions with full logits."""

import pytest
import torch
import torch.nn.functional as F

from modules.backbone.model import Network
from modules.batch import PackedBatch, target_positions
from modules.objectives.next_token import next_token_loss
from tests.modules.helpers import (
    BF16,
    assert_close,
    assert_same_gradients,
    counts_of,
    document_ids,
    gradients,
    make_network,
    packed_batch,
    relative_error,
    spans,
    tiny_config,
)


def by_loop(network: Network, batch: PackedBatch, counts: list[int], depths: int, factor: float):
    """L_0 + (factor / M) sum_k L_k; part k at t is about the label of t + k, if that lies in t's document."""
    output = network(batch.tokens, batch.document_ids, depths)
    nats = [torch.zeros(()) for _ in range(depths + 1)]
    for depth, hidden in enumerate([output.hidden, *output.mtp_hidden]):
        logits = network.logits(hidden)
        for row, part in spans(batch.document_ids):
            for t in range(part.start, part.stop - depth):
                label = batch.labels[row, t + depth]
                if label != -100:
                    nats[depth] = nats[depth] - F.log_softmax(logits[row, t], dim=-1)[label]
    loss = nats[0] / max(counts[0], 1)
    for depth in range(1, depths + 1):
        loss = loss + factor / depths * nats[depth] / max(counts[depth], 1)
    return loss, torch.stack(nats)


@pytest.mark.parametrize(("masked", "picked"), [(0.0, False), (0.4, False), (0.4, True)])
@pytest.mark.parametrize("depths", [0, 1, 2, 3])
def test_equals_a_loop(depths: int, masked: float, picked: bool) -> None:
    network = make_network(tiny_config(hybrid_override_pattern="M*"))
    batch = packed_batch(document_ids([1, 2, 9], [12]), 64, masked=masked)
    if picked:
        batch.positions = target_positions(batch.labels, batch.document_ids, depths)
        assert len(batch.positions) == counts_of(batch, depths).sum()
    counts = 3 * counts_of(batch, depths)  # those of a window three times as large
    parts = next_token_loss(network, batch, counts, depths, 0.3)
    parts.loss.backward()
    ours = gradients(network)
    network.zero_grad()
    expected, nats = by_loop(network, batch, counts.tolist(), depths, 0.3)
    expected.backward()
    assert_close(parts.loss, expected, 1e-5, "loss")
    assert_close(parts.nats, nats, 1e-5, "nats")
    assert not parts.nats.requires_grad
    assert_same_gradients(ours, gradients(network), 1e-4)


def test_no_targets_at_all_is_zero_and_finite() -> None:
    network = make_network(tiny_config())
    batch = packed_batch(document_ids([1] * 6), 64)
    assert counts_of(batch, 2).tolist() == [0, 0, 0]
    parts = next_token_loss(network, batch, counts_of(batch, 2), 2, 0.3)
    parts.loss.backward()
    assert parts.loss.item() == 0
    assert all(gradient.eq(0).all() for gradient in gradients(network).values())


def test_bf16_is_near() -> None:
    config = tiny_config(hybrid_override_pattern="M*", mtp_hybrid_override_pattern="*-")
    batch = packed_batch(document_ids([5, 11], [16]), 64)
    loss, low = (
        next_token_loss(network, batch, counts_of(batch, 1), 1, 0.3).loss
        for network in (make_network(config), make_network(config, BF16))
    )
    assert low.dtype == torch.float32
    assert 0 < relative_error(low, loss) < 2e-2
