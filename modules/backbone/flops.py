"""Matrix-product FLOPs of a network in closed form, part by part.

Convention (that of `torch.utils.flop_counter`, against which the tests hold every formula): 2 per multiply-add, matrix
products only, causal attention as the full T x T square, one document per row, nothing recomputed but attention scores
in the backward pass. The parts are fine enough to come to another convention: halve the attention scores, leave out the
scan, the head or what begins with MTP.
Shapes: T positions, D hidden, V vocabulary, H heads, P head dim, N state, G groups, E experts, K top-k, L latent.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from modules.backbone.config import BackboneConfig

MTP = "MTP "
"""Prefix of the parts that the MTP block adds, at all depths together."""


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one part."""

    forward: int = 0
    """Forward pass."""
    backward: int = 0
    """Backward pass: gradients of inputs and weights."""

    @property
    def total(self) -> int:
        """Forward and backward pass."""
        return self.forward + self.backward

    def __add__(self, other: "FlopCount") -> "FlopCount":
        return FlopCount(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, copies: int) -> "FlopCount":
        return FlopCount(self.forward * copies, self.backward * copies)


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
    counts: dict[str, FlopCount] = {}
    for letter in config.hybrid_override_pattern:
        _add(counts, _mixer(config, letter, sequence_length))
    if mtp_depths:
        block = {MTP + "eh_proj": _product(sequence_length, 2 * config.hidden_size, config.hidden_size)}
        for letter in config.mtp_hybrid_override_pattern:
            _add(block, {MTP + part: count for part, count in _mixer(config, letter, sequence_length).items()})
        counts |= {part: count * mtp_depths for part, count in block.items()}
    head = _product(sequence_length, config.hidden_size, config.vocab_size)
    counts["head"] = head
    if mtp_depths:
        counts[MTP + "head"] = head * mtp_depths
    return counts


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
    counts: dict[str, FlopCount] = {}
    for letter in config.hybrid_override_pattern:
        _add(counts, _mixer(config, letter, 1))
    mamba, attention = (config.hybrid_override_pattern.count(letter) for letter in "M*")
    decoded = {part: count.forward for part, count in counts.items()}
    if mamba:  # h += dt x B^T, y = h C
        decoded["Mamba-2 scan"] = mamba * 2 * 2 * config.mamba_inner_size * config.ssm_state_size
    if attention:
        decoded["attention scores"] = attention * 2 * 2 * context * config.num_attention_heads * config.head_dim
    decoded["head"] = 2 * config.hidden_size * config.vocab_size
    return decoded


def recomputed_flops(config: BackboneConfig, sequence_length: int, mtp_depths: int) -> int:
    """Count what activation checkpointing runs again for one row, beside `matmul_flops`; arguments as there.

    Recomputation stops at the last tensor that the backward pass needs (early stop of the non-reentrant
    `torch.utils.checkpoint`): a last projection needs its input, so its own product does not run again.
    """
    letters = config.hybrid_override_pattern + mtp_depths * config.mtp_hybrid_override_pattern
    return sum(
        sum(count.forward for count in _mixer(config, letter, sequence_length).values())
        - _product(sequence_length, _last_inputs(config, letter), config.hidden_size).forward
        for letter in letters
    )


def _last_inputs(config: BackboneConfig, letter: str) -> int:
    """Return the in-features of the projection that ends a layer; 0 where the combination of experts ends it."""
    if letter == "M":
        return config.mamba_inner_size
    if letter == "*":
        return config.num_attention_heads * config.head_dim
    if letter == "-":
        return config.intermediate_size
    return config.moe_shared_expert_intermediate_size or config.moe_latent_size or 0


def _mixer(config: BackboneConfig, letter: str, length: int) -> dict[str, FlopCount]:
    """Return the parts of one layer over a row."""
    D, heads = config.hidden_size, config.num_attention_heads
    if letter == "M":
        inner = config.mamba_inner_size
        inputs = inner + config.mamba_conv_size + config.mamba_num_heads
        return {
            "Mamba-2 projections": _product(length, D, inputs) + _product(length, inner, D),
            "Mamba-2 scan": sum(_scan_products(config, length), FlopCount()),
        }
    if letter == "*":
        query, key = heads * config.head_dim, config.num_key_value_heads * config.head_dim
        return {
            "attention projections": _product(length, D, query + 2 * key) + _product(length, query, D),
            "attention scores": _attention(length, heads, config.head_dim),
        }
    if letter == "-":
        return {"MLP": _product(length, D, config.intermediate_size) * 2}
    return dict(_mixture(config, length))


def _mixture(config: BackboneConfig, length: int) -> Iterator[tuple[str, FlopCount]]:
    """Yield the parts of a mixture layer over a row."""
    D, size, chosen = config.hidden_size, config.expert_size, config.num_experts_per_tok
    yield "MoE router", _product(length, D, config.n_routed_experts)
    if config.moe_latent_size is not None:
        yield "MoE latent projections", _product(length, D, size) * 2
    yield "MoE routed experts", _product(length * chosen, size, config.moe_intermediate_size) * 2
    if config.moe_shared_expert_intermediate_size:
        yield "MoE shared expert", _product(length, D, config.moe_shared_expert_intermediate_size) * 2


def _scan_products(config: BackboneConfig, length: int) -> Iterator[FlopCount]:
    """Yield the matrix products of the chunked scan (`modules/ops/chunked_scan.py`) over a row, in their order."""
    chunk = min(config.chunk_size, length)
    rows, inner, states = -(-length // chunk) * chunk, config.mamba_inner_size, config.ssm_state_size
    yield _product(rows, states, chunk) * config.n_groups  # C B^T, once per group
    yield _product(rows, chunk, inner)  # its product with dt x, per head
    yield _product(rows, states, inner)  # what a chunk adds to the state
    yield _product(rows, states, inner)  # what the state before a chunk gives


def _attention(length: int, heads: int, channels: int) -> FlopCount:
    """Scores and their product with the values; the backward pass computes the scores again."""
    product = 2 * length * length * heads * channels
    return FlopCount(2 * product, 5 * product)


def _product(rows: int, inputs: int, outputs: int) -> FlopCount:
    """[rows, inputs] x [inputs, outputs], and the two products of its gradients."""
    forward = 2 * rows * inputs * outputs
    return FlopCount(forward, 2 * forward)


def _add(counts: dict[str, FlopCount], more: Mapping[str, FlopCount]) -> None:
    for part, count in more.items():
        counts[part] = counts.get(part, FlopCount()) + count
