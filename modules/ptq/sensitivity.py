"""How far a network's predictions move when a single group of layers is quantised.

The measure is the KL divergence of the next-token distributions, the original's to the changed network's: what
distillation recovers and what benchmarks feel, and it needs no gradient. The original runs once; of it the hidden
states are kept, not the logits, which are wider by far, since the head stays as it is.
Shapes: N tokens of a pass, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import cast

import torch
from torch import Tensor

from modules.backbone.model import Network
from modules.precision.linear import GroupedLinear, Linear
from modules.precision.quantized import QuantizedWeight
from modules.precision.served import served
from modules.ptq.calibration import Packed, pack
from modules.ptq.layers import Choice, Group

LOGITS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Elements of a logits tensor: 4 MiB in fp32, which a CPU's cache holds (less than half the time of 64 MiB)."""


@torch.inference_mode()
def measure(
    network: Network,
    groups: Sequence[Group],
    candidates: Sequence[Choice],
    make: Callable[[str, Choice], QuantizedWeight],
    rows: Sequence[Sequence[int]],
    *,
    batch_tokens: int,
    advance: Callable[[int], None],
) -> dict[str, dict[Choice, float]]:
    """Measure every candidate format of every group.

    Args:
        network: the original, in evaluation mode; comes back as it was.
        groups: to measure.
        candidates: quantised formats.
        make: returns the quantised weight of a public name in a format.
        rows: token ids of each text.
        batch_tokens: most tokens in a forward pass.
        advance: gets the tokens of each pass.

    Returns:
        KL(original || changed) in nats per token, by name of the group and format.
    """
    batches = list(pack(rows, batch_tokens, network.backbone.embeddings.weight.device))
    tokens = sum(batch.tokens.numel() for batch in batches)
    original = [_run(network, batch, advance) for batch in batches]
    losses: dict[str, dict[Choice, float]] = {}
    for group in groups:
        losses[group.name] = {}
        for choice in candidates:
            with ExitStack() as stack:
                for layer in group.layers:
                    module = cast(Linear | GroupedLinear, network.get_submodule(layer.module))
                    stack.enter_context(served(module, _made(make, layer.weights, choice)))
                total = sum(
                    _divergence(network, before, _run(network, batch, advance))
                    for before, batch in zip(original, batches, strict=True)
                )
            losses[group.name][choice] = max(total / tokens, 0.0)
    return losses


def _made(
    make: Callable[[str, Choice], QuantizedWeight], names: Iterable[str], choice: Choice
) -> Iterable[QuantizedWeight]:
    return (make(name, choice) for name in names)


def _run(network: Network, batch: Packed, advance: Callable[[int], None]) -> Tensor:
    """Return the hidden states [N, D] of a pass."""
    hidden = network(batch.tokens, batch.document_ids).hidden[0]
    advance(batch.tokens.numel())
    return hidden


def _divergence(network: Network, original: Tensor, changed: Tensor) -> float:
    """Return the sum over N tokens of KL(original || changed), of hidden states [N, D]."""
    total, size = 0.0, max(LOGITS_AT_ONCE[original.device.type] // network.config.vocab_size, 1)
    for before, after in zip(original.split(size), changed.split(size), strict=True):
        p, q = (network.logits(states).log_softmax(-1) for states in (before, after))
        total += float((p.exp() * (p - q)).sum(-1).double().sum())
    return total
