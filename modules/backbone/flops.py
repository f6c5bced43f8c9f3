"""Matrix-product FLOPs of a network in closed form, part by part.

Convention (that of `torch.utils.flop_counter`, against which the tests hold every formula): 2 per multiply-add, matrix
products only, causal attention as the full T x T square, one document per row, nothing recomputed but attention scores
in the backward pass. The parts are fine enough to come to another convention: halve the attention scores, leave out the
scan, the head or what begins with MTP.
Shapes: T positions, D hidden, V vocabulary, M MTP depths.
"""

from collections.abc import Mapping

import torch
from torch import nn

from modules.backbone.config import BackboneConfig
from modules.backbone.layer import Layer
from modules.backbone.mixer import FlopCount, Mixer
from modules.backbone.router import Router
from modules.precision.linear import FormattedModule

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
    mixers, counts = mixers_of(config), {}
    for letter in config.hybrid_override_pattern:
        _add(counts, _training(mixers[letter], sequence_length))
    head = FlopCount.of_products(sequence_length * config.hidden_size * config.vocab_size)
    if not mtp_depths:
        return counts | {"head": head}
    block = {"eh_proj": FlopCount.of_products(sequence_length * 2 * config.hidden_size**2)}
    for letter in config.mtp_hybrid_override_pattern:
        _add(block, _training(mixers[letter], sequence_length))
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
    mixers = mixers_of(config)
    decoded: dict[str, int] = {}
    for letter in config.hybrid_override_pattern:
        mixer = mixers[letter]
        once = {part: 2 * weights for part, weights in _weights(mixer).items()}
        once |= dict.fromkeys(mixer.WEIGHTLESS.values(), mixer.weightless_decode_flops(context))
        for part, flops in once.items():
            decoded[part] = decoded.get(part, 0) + flops
    return decoded | {"head": 2 * config.hidden_size * config.vocab_size}


def recomputed_flops(config: BackboneConfig, sequence_length: int, mtp_depths: int) -> int:
    """Count what activation checkpointing runs again for one row, beside `matmul_flops`; arguments as there.

    Recomputation stops at the last tensor that the backward pass needs (early stop of the non-reentrant
    `torch.utils.checkpoint`): a last projection needs its input, so its own product does not run again.
    """
    mixers, again = mixers_of(config), 0
    for letter in config.hybrid_override_pattern + mtp_depths * config.mtp_hybrid_override_pattern:
        last = mixers[letter].last
        again += sum(count.forward for count in _training(mixers[letter], sequence_length).values())
        again -= 0 if last is None else 2 * sequence_length * last.active
    return again


def mixers_of(config: BackboneConfig) -> dict[str, Mixer]:
    """Return a mixer of each kind that a network has, by its letter; on the meta device."""
    mtp = config.mtp_hybrid_override_pattern if config.num_nextn_predict_layers else ""
    with torch.device("meta"):
        return {letter: Layer(config, letter).mixer for letter in {*config.hybrid_override_pattern, *mtp}}


def _weights(mixer: Mixer) -> dict[str, int]:
    """Return the number of weights that a token is multiplied by, part by part."""
    children, weights = dict(mixer.named_children()), {}
    for child, part in mixer.PARTS.items():
        if child in children:
            weights[part] = weights.get(part, 0) + _active(children[child])
    return weights


def _active(module: nn.Module) -> int:
    if isinstance(module, Router):
        return module.weight.numel()
    return sum(part.active for part in module.modules() if isinstance(part, FormattedModule))


def _training(mixer: Mixer, length: int) -> dict[str, FlopCount]:
    """Return the parts of one layer over a row."""
    counts = {part: FlopCount.of_products(length * weights) for part, weights in _weights(mixer).items()}
    return counts | dict.fromkeys(mixer.WEIGHTLESS.values(), mixer.weightless_flops(length))


def _add(counts: dict[str, FlopCount], more: Mapping[str, FlopCount]) -> None:
    for part, count in more.items():
        counts[part] = counts.get(part, FlopCount()) + count
