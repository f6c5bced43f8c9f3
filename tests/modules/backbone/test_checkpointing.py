"""Recomputing activations changes no number: states, losses, gradients, expert counts and expert biases."""

import pytest
import torch

from modules.backbone.layer import Layer
from modules.objectives.next_token import next_token_loss, sequence_auxiliary_loss
from tests.modules.helpers import (
    BF16,
    FP32,
    ListData,
    counts_of,
    document_ids,
    fit,
    gradients,
    make_module,
    make_network,
    network_state,
    packed_batch,
    tiny_config,
)


@pytest.mark.parametrize("recipe", [FP32, BF16], ids=["fp32", "bf16"])
def test_same_loss_gradients_and_counts(recipe) -> None:
    batch = packed_batch(document_ids([5, 11], [16]), 64)
    results = []
    for checkpointed in (False, True):
        network = make_network(tiny_config(), recipe).train()
        if checkpointed:
            network.checkpoint_activations()
        parts = next_token_loss(network, batch, counts_of(batch, 2), 2, 0.3)
        (parts.loss + 0.1 * sequence_auxiliary_loss(parts.output.router)).backward()
        counts = torch.cat([routing.counts for routing in parts.output.router])
        results.append({"loss": parts.loss, "nats": parts.nats, "counts": counts} | gradients(network))
    assert results[0]["counts"].sum(-1).tolist() == [32] * 8, "two rows in two layers, and at two MTP depths"
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name


def test_layers_run_twice_in_training_and_once_in_validation() -> None:
    network = make_network(tiny_config())
    network.checkpoint_activations()
    layers = [module for module in network.modules() if isinstance(module, Layer)]
    runs = dict.fromkeys(range(len(layers)), 0)

    def count(index: int) -> None:
        runs[index] += 1

    for index, layer in enumerate(layers):
        layer.norm.register_forward_hook(lambda *_, index=index: count(index))
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    network.train()(tokens, mtp_depths=1).mtp_hidden[0].sum().backward()
    assert set(runs.values()) == {2}
    network.eval()(tokens, mtp_depths=1).mtp_hidden[0].sum().backward()
    assert set(runs.values()) == {3}


def test_same_training_with_expert_biases() -> None:
    batches = [packed_batch(document_ids([5, 11], [16]), 64, seed=seed) for seed in range(4)]
    states = []
    for checkpointed in (False, True):
        module = make_module(activation_checkpointing=checkpointed)
        fit(module, ListData(batches, window=2))
        states.append(network_state(module))
    for name, tensor in states[0].items():
        assert torch.equal(states[1][name], tensor), name
    assert states[0]["backbone.layers.1.mixer.gate.e_score_correction_bias"].abs().max() > 0
