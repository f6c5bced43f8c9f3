"""How far a network's predictions move when a single group of layers is quantised.

The measure is the KL divergence of the next-token distributions, the original's to the changed network's: what
distillation recovers and what benchmarks feel, and it needs no gradient. What comes before a group is not changed by
it, so the original goes layer by layer through the network, and only from a group's layer on it is run again.
Of the passes the hidden states are kept, not the logits, which are wider by far: the head stays as it is.
Shapes: N tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import cast

import torch
from torch import Tensor, nn

from modules.backbone.model import Network
from modules.ops.documents import DocumentLayout
from modules.precision import quantized_product
from modules.precision.linear import GroupedLinear, Linear
from modules.precision.quantized import QuantizedWeight
from modules.ptq.calibration import pack
from modules.ptq.layers import Choice, Group


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
        groups: to measure, none of the MTP block.
        candidates: quantised formats.
        make: returns the quantised weight of a public name in a format.
        rows: token ids of each text.
        batch_tokens: most tokens in a forward pass.
        advance: gets the tokens of each pass.

    Returns:
        KL(original || changed) in nats per token, by name of the group and format.
    """
    batches = list(pack(rows, batch_tokens, network.backbone.embeddings.weight.device))
    documents = [DocumentLayout(batch.document_ids) for batch in batches]
    tokens = sum(batch.tokens.numel() for batch in batches)
    layers = list(network.backbone.layers)
    states = [network.backbone.embeddings(batch.tokens) for batch in batches]

    def finish(number: int) -> Tensor:
        """Return the hidden states [N, D] that come of `states` from a layer on."""
        results = []
        for state, layout in zip(states, documents, strict=True):
            results.append(network.backbone.norm_f(_run(layers[number:], state, layout))[0])
            advance(state.shape[1])
        return torch.cat(results)

    original = finish(0)
    losses: dict[str, dict[Choice, float]] = {group.name: {} for group in groups}
    for number, layer in enumerate(layers):
        changed: dict[tuple[str, Choice], Tensor] = {}
        for group in (group for group in groups if group.name.startswith(f"backbone.layers.{number}.")):
            for choice in candidates:
                with ExitStack() as stack:
                    for part in group.layers:
                        module = cast(Linear | GroupedLinear, network.get_submodule(part.module))
                        stack.enter_context(quantized_product.temporarily(module, _made(make, part.weights, choice)))
                    changed[group.name, choice] = finish(number)
        if changed:
            totals = _divergences(network, original, list(changed.values()))
            for (name, choice), total in zip(changed, totals, strict=True):
                losses[name][choice] = max(total / tokens, 0.0)
        states = [_run([layer], state, layout) for state, layout in zip(states, documents, strict=True)]
    return losses


def _made(
    make: Callable[[str, Choice], QuantizedWeight], names: Iterable[str], choice: Choice
) -> Iterable[QuantizedWeight]:
    return (make(name, choice) for name in names)


def _run(layers: Sequence[nn.Module], state: Tensor, documents: DocumentLayout) -> Tensor:
    for layer in layers:
        state, _ = layer(state, documents)
    return state


def _divergences(network: Network, original: Tensor, changed: Sequence[Tensor]) -> list[float]:
    """Return the sums over N tokens of KL(original || changed), of hidden states [N, D]."""
    totals = torch.zeros(len(changed), dtype=torch.float64, device=original.device)
    for before, *after in zip(*map(network.split_for_logits, (original, *changed)), strict=True):
        p = network.logits(before).log_softmax(-1)
        shares = p.exp()
        for total, states in zip(totals, after, strict=True):
            q = network.logits(states).log_softmax(-1)
            total += (shares * (p - q)).sum(-1).double().sum()
    return totals.tolist()
