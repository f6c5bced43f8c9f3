"""Compiled layers compute what eager ones do, for every kind of layer, with documents that differ in every batch.

By torch.compile's tracer alone (`backend="eager"`): what it cannot trace is an error of `model.compile_layers` on every
device; what it makes of the traced operations is torch's affair, and takes a minute on a CPU.
"""

import pytest
import torch

from modules.backbone.layer import Layer
from modules.objectives.next_token import next_token_loss
from tests.modules.helpers import (
    BF16,
    FP32,
    assert_close,
    assert_same_gradients,
    counts_of,
    document_ids,
    gradients,
    make_network,
    packed_batch,
    tiny_config,
)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("recipe", [FP32, BF16], ids=["fp32", "bf16"])
def test_compiled_layers_equal_eager_ones(recipe, checkpointed: bool) -> None:
    torch.compiler.reset()
    eager, compiled = (make_network(tiny_config(hybrid_override_pattern="ME*-"), recipe).train() for _ in range(2))
    for network in (eager, compiled):
        if checkpointed:
            network.checkpoint_activations()
    for layer in filter(lambda module: isinstance(module, Layer), compiled.modules()):
        layer.compile(backend="eager")
    for seed, rows in enumerate([([5, 11], [16]), ([2, 2, 12], [1, 15])]):
        losses = []
        for network in (eager, compiled):
            batch = packed_batch(document_ids(*rows), 64, seed=seed)
            losses.append(next_token_loss(network, batch, counts_of(batch, 2), 2, 0.3).loss)
            losses[-1].backward()
        assert_close(losses[1], losses[0], 1e-6)
    assert_same_gradients(gradients(compiled), gradients(eager), 1e-5)
