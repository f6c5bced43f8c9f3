"""Parameters and active parameters of a network, part by part."""

from collections import Counter
from dataclasses import dataclass

from app.planning.text import align
from modules.backbone.config import MIXERS
from modules.backbone.latent_moe import LatentMoE
from modules.backbone.model import Network
from modules.precision.adapter import Adapter
from modules.precision.linear import GroupedLinear
from modules.precision.lora import adapters

PARTS = (
    *("Mamba-2", "attention", "MLP"),
    *("MoE routed experts", "MoE shared expert", "MoE latent projections", "MoE router"),
    *("norms", "embedding", "head", "adapters", "MTP"),
)
"""In the order to print."""


@dataclass(frozen=True, kw_only=True)
class Count:
    """Sizes of one part of a network."""

    parameters: int = 0
    """Trained values."""
    biases: int = 0
    """Router biases: not trained by gradients, but stored in checkpoints."""
    active: int = 0
    """Parameters one token uses."""

    def __add__(self, other: "Count") -> "Count":
        return Count(
            parameters=self.parameters + other.parameters,
            biases=self.biases + other.biases,
            active=self.active + other.active,
        )

    @property
    def total(self) -> str:
        """Parameters, then elements of a checkpoint (with the router biases) in brackets."""
        return f"{self.parameters:,} ({self.parameters + self.biases:,})"


def count_parts(network: Network) -> dict[str, Count]:
    """Count a network's parameters part by part.

    Args:
        network: on any device, meta included.

    Returns:
        A `Count` per part of `PARTS` that occurs; a weight that embedding and head share counts once, as embedding.
    """
    counts: dict[str, Count] = {}
    for name, parameter in network.named_parameters():
        part, owner, size = _part(name, network), network.get_submodule(name.rpartition(".")[0]), parameter.numel()
        layer = network.get_submodule(name.partition(".adapter.")[0]) if isinstance(owner, Adapter) else owner
        active = round(size * layer.active_share) if isinstance(layer, GroupedLinear) else size
        counts[part] = counts.get(part, Count()) + Count(parameters=size, active=active)
    for name, buffer in network.named_buffers():
        counts[_part(name, network)] += Count(biases=buffer.numel())
    return {part: counts[part] for part in PARTS if part in counts}


def _part(name: str, network: Network) -> str:
    """Return the part of `PARTS` that a parameter or buffer belongs to, by its full name."""
    match name.split("."):
        case ["mtp", *_]:
            return "MTP"
        case [*_, "adapter", _]:
            return "adapters"
        case ["lm_head", *_]:
            return "head"
        case ["backbone", "embeddings", *_]:
            return "embedding"
        case ["backbone", "layers", index, "mixer", inner, *_]:
            letter = network.config.hybrid_override_pattern[int(index)]
            return LatentMoE.PARTS[inner] if letter == "E" else MIXERS[letter]
        case _:
            return "norms"


def _copies(network: Network) -> Counter[str]:
    """Return how often each part occurs."""
    config = network.config
    letters = config.hybrid_override_pattern
    copies = Counter({"norms": len(letters) + 1, "embedding": 1, "head": 1, "MTP": config.num_nextn_predict_layers})
    for letter in letters:
        copies.update(set(LatentMoE.PARTS.values()) if letter == "E" else [MIXERS[letter]])
    copies["adapters"] = len(list(adapters(network.backbone)))
    return copies


def parameter_lines(network: Network, mtp_depths: int) -> list[str]:
    """Return the parameter table and the totals.

    Args:
        network: on any device, meta included.
        mtp_depths: depths M the MTP block is applied at.
    """
    counts = count_parts(network)
    copies = _copies(network)
    rows = [("part", "copies", "parameters", "active per token")]
    rows += [(part, str(copies[part]), f"{c.parameters:,}", f"{c.active:,}") for part, c in counts.items()]
    backbone = sum((count for part, count in counts.items() if part != "MTP"), Count())
    lines = [*align(rows), "", "total: parameters (elements of a checkpoint, router biases included)"]
    if "MTP" in counts:
        lines += [
            f"  with MTP           {(backbone + counts['MTP']).total}",
            f"  without MTP        {backbone.total}",
            f"  MTP depths         {mtp_depths}, all by the one block",
        ]
    else:
        lines.append(f"  without MTP        {backbone.total}")
    share = backbone.active / (backbone.parameters or 1)
    if network.config.tie_word_embeddings:
        without = f"{backbone.active:,}: it is the head too"
    else:
        without = f"{backbone.active - counts['embedding'].active:,}"
    return [
        *lines,
        f"  active per token   {backbone.active:,} ({share:.1%}), MTP left out",
        f"  the same without the input embedding   {without}",
    ]
