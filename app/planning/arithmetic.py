"""The FLOPs of a token, part by part, with the format each part computes in."""

from collections.abc import Sequence

from app.planning.text import align, prefix, with_prefix
from modules.backbone.attention import Attention
from modules.backbone.config import BackboneConfig
from modules.backbone.flops import MTP, decode_flops, matmul_flops, recomputed_flops
from modules.backbone.latent_moe import LatentMoE
from modules.backbone.mamba import Mamba2
from modules.backbone.mixer import FlopCount, Mixer
from modules.backbone.mlp import MLP
from modules.precision.formats import COMPUTE_DTYPE

_MIXERS: dict[str, type[Mixer]] = {"M": Mamba2, "*": Attention, "-": MLP, "E": LatentMoE}

_FULL_PRECISION = ("MoE router",)


def flop_lines(
    config: BackboneConfig,
    precision: Sequence[tuple[str, str, str]],
    sequence_length: int,
    mtp_depths: int,
    checkpointing: bool,
) -> list[str]:
    """Return the table of FLOPs per token and its totals.

    Args:
        config: the network.
        precision: (module name, format, deciding pattern) of each module, of `assign_formats`.
        sequence_length: positions in a row.
        mtp_depths: MTP depths that are trained.
        checkpointing: whether the layers' activations are recomputed.
    """
    counts = matmul_flops(config, sequence_length, mtp_depths)
    decoded, formats = decode_flops(config, sequence_length), part_formats(config, precision)
    training = {part: count.total / sequence_length for part, count in counts.items()}
    total, decoded_total = sum(training.values()), sum(decoded.values())
    size, prefix_name = prefix(total)
    rows = [(f"{prefix_name}FLOP", "formats", "training", "share", f"decoding at {sequence_length:,}", "share")]
    for part, flops in training.items():
        once = decoded.get(part)
        amount, share = ("", "") if once is None else (f"{once / size:,.4f}", f"{once / decoded_total:.1%}")
        rows.append((part, formats[part], f"{flops / size:,.4f}", f"{flops / total:.1%}", amount, share))
    rows.append(("all", "", f"{total / size:,.4f}", "", f"{decoded_total / size:,.4f}", ""))
    shares: dict[str, float] = {}
    for part, flops in training.items():
        shares[formats[part]] = shares.get(formats[part], 0.0) + flops / total
    summed = sum(counts.values(), FlopCount())
    lines = [
        *align(rows, text_columns=(0, 1)),
        "",
        f"training: forward pass {with_prefix(summed.forward / sequence_length, 'FLOP')}, "
        f"backward pass {with_prefix(summed.backward / sequence_length, 'FLOP')}",
        "by formats: " + "; ".join(f"{name} {share:.1%}" for name, share in shares.items()),
    ]
    if checkpointing:
        again = recomputed_flops(config, sequence_length, mtp_depths) / sequence_length
        lines.append(f"recomputed by activation checkpointing, not counted above: {with_prefix(again, 'FLOP')}")
    return [
        *lines,
        "matrix products only, 2 per multiply-add, causal attention as the full square, a document per row;",
        "decoding: one token with cached keys and states at that context, no MTP drafts",
    ]


def part_formats(config: BackboneConfig, precision: Sequence[tuple[str, str, str]]) -> dict[str, str]:
    """Return the formats that each part of `matmul_flops` computes in, e.g. `bf16` or `bf16, fp32`."""
    formats: dict[str, dict[str, None]] = {}
    for name, chosen, _ in precision:
        for part, format_name in _parts_of(name, chosen, config):
            formats.setdefault(part, {})[format_name] = None
    for where in ("", MTP):
        formats |= {where + part: {"fp32": None} for part in _FULL_PRECISION}
    return {part: ", ".join(chosen) for part, chosen in formats.items()}


def _parts_of(name: str, chosen: str, config: BackboneConfig) -> list[tuple[str, str]]:
    """Return (part, format) of what a module's format decides."""
    match name.split("."):
        case ["lm_head"]:
            return [("head", chosen), (MTP + "head", chosen)]
        case ["mtp", "layers", _, "eh_proj"]:
            return [(MTP + "eh_proj", chosen)]
        case [first, *_, index, "mixer", inner] | [first, *_, index, "mixer", inner, "up_proj" | "down_proj"]:
            where = MTP if first == "mtp" else ""
            letters = config.mtp_hybrid_override_pattern if first == "mtp" else config.hybrid_override_pattern
            mixer = _MIXERS[letters[int(index)]]
            parts = [(where + mixer.PARTS[inner], chosen)]
            if inner in mixer.WEIGHTLESS:
                results = next(name for name, dtype in COMPUTE_DTYPE.items() if dtype == COMPUTE_DTYPE[chosen])
                parts.append((where + mixer.WEIGHTLESS[inner], results))
            return parts
    return []
