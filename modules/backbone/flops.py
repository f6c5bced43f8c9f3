"""Matrix-product FLOPs of a network in closed form, part by part.

Convention (that of `torch.utils.flop_counter`, against which the tests hold every formula): 2 per multiply-add, matrix
products only, causal attention as the full T x T square, one document per row, nothing recomputed but attention scores
in the backward pass. The parts are fine enough to come to another convention: halve the attention scores, leave out the
scan, the head or what begins with MTP.
Shapes: T positions, D hidden, V vocabulary, M MTP depths.
"""

from collections import Counter

import torch

from modules.backbone.config import BackboneConfig
from modules.backbone.layer import Layer
from modules.backbone.mixer import FlopCount, Mixer
from modules.backbone.router import Router
from modules.precision.linear import FormattedModule, Linear

MTP = "MTP "
"""Prefix of the parts that the MTP block adds, at all depths together."""


def matmul_flops(config: BackboneConfig, sequence_length: int, mtp_depths: int) -> dict[str, FlopCount]:
    """Count a training pass over one row.

    Args:
        config: the network.
        sequence_length: positions T of the row, one document.
        mtp_depths: MTP depths M that are trained.

    Returns:
        FLOPs of one row (not of one token: these are exact) by part, in the order they run; the parts of the MTP block
        begin with `MTP`. The head computes its gradients in the forward pass; they count as backward here.
    """
    counts = _layers(config, config.hybrid_override_pattern, sequence_length)
    head = FlopCount.of_products(sequence_length * config.hidden_size * config.vocab_size)
    if not mtp_depths:
        return counts | {"head": head}
    block = {"eh_proj": FlopCount.of_products(sequence_length * 2 * config.hidden_size**2)}
    block |= _layers(config, config.mtp_hybrid_override_pattern, sequence_length)
    counts |= {MTP + part: count * mtp_depths for part, count in block.items()}
    return counts | {"head": head, MTP + "head": head * mtp_depths}


def training_flops_per_token(config: BackboneConfig, sequence_length: int, mtp_depths: int) -> float:
    """Return the FLOPs of forward and backward pass per position; see `matmul_flops` for arguments and convention."""
    counts = matmul_flops(config, sequence_length, mtp_depths)
    return sum(count.total for count in counts.values()) / sequence_length


def decode_flops(config: BackboneConfig, context: int) -> dict[str, int]:
    """Count what one more token costs with cached keys, values and states, without MTP drafts.

    Args:
        config: the network.
        context: positions that attention looks at, the new one included.

    Returns:
        FLOPs by part; the parts are those of `matmul_flops`.
    """
    counts = _layers(config, config.hybrid_override_pattern, 1, context)
    head = {"head": 2 * config.hidden_size * config.vocab_size}
    return {part: count.forward for part, count in counts.items()} | head


def recomputed_flops(config: BackboneConfig, sequence_length: int, mtp_depths: int) -> int:
    """Count what activation checkpointing runs again for one row, beside `matmul_flops`; arguments as there.

    Recomputation stops at the last tensor that the backward pass needs (early stop of the non-reentrant
    `torch.utils.checkpoint`): a last projection needs its input, so its own product does not run again.
    """
    letters = config.hybrid_override_pattern + mtp_depths * config.mtp_hybrid_override_pattern
    again = sum(count.forward for count in _layers(config, letters, sequence_length).values())
    for letter, copies in Counter(letters).items():
        ends = [part for part in _mixer(config, letter).modules() if isinstance(part, Linear) and part.writes_residual]
        last = ends[-1].active if ends else 0  # without one the layer ends with the sum of its experts
        again -= copies * 2 * sequence_length * last
    return again


def _mixer(config: BackboneConfig, letter: str) -> Mixer:
    """Return the mixer of a letter on the meta device."""
    with torch.device("meta"):
        return Layer(config, letter).mixer


def _layers(config: BackboneConfig, letters: str, length: int, context: int | None = None) -> dict[str, FlopCount]:
    """Return the parts of the layers of a layer string over a row; for `context` see `Mixer.weightless_flops`."""
    counts: dict[str, FlopCount] = {}
    for letter, copies in Counter(letters).items():
        mixer = _mixer(config, letter)
        children = dict(mixer.named_children())
        for name in filter(children.__contains__, mixer.PARTS):
            products = [part for part in children[name].modules() if isinstance(part, FormattedModule | Router)]
            count = FlopCount.of_products(length * sum(part.active for part in products)) * copies
            counts[mixer.PARTS[name]] = counts.get(mixer.PARTS[name], FlopCount()) + count
        counts |= dict.fromkeys(mixer.WEIGHTLESS.values(), mixer.weightless_flops(length, context) * copies)
    return counts
