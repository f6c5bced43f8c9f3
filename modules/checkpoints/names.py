"""The public names of a network's tensors, and where each lives in memory.

Names in memory are those of the open checkpoints already, but for the routed experts: memory holds those of a layer in
one stacked tensor `[E, out, in]`, the files hold each expert by itself, and a tied head is no tensor of its own. So the
network itself is the list of names: nothing here has to be kept in step with it.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch

from modules.backbone.config import BackboneConfig
from modules.backbone.model import Network
from modules.errors import UserError

PLACEHOLDER_WIDTH = 1
"""Width of the all-zero shared expert that stands in a file for none: transformers cannot build a mixture without."""
STACKED = ".mixer.experts."
"""What the names of stacked tensors hold; the shared expert is called otherwise."""
SHARED = ".shared_experts."
HEAD, EMBEDDING = "lm_head.weight", "backbone.embeddings.weight"
MTP = "mtp."


class TensorInfo(NamedTuple):
    """What a file says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Place(NamedTuple):
    """Where a public tensor lives."""

    parameter: str
    """Name in `Network.state_dict()`."""
    expert: int | None
    """Index along dimension 0 of a stacked tensor; None: the tensor is that parameter itself."""


def public_names(config: BackboneConfig) -> dict[str, Place]:
    """Return where each public tensor lives, in the network's order; the experts of one stacked tensor are adjacent."""
    return {name: place for name, place, _ in _tensors(config)}


def public_shapes(config: BackboneConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each public tensor, in the order of `public_names`."""
    return {name: shape for name, _, shape in _tensors(config)}


def shapes_in_files(config: BackboneConfig, held: int, file: Path) -> dict[str, tuple[int, ...]]:
    """Return `public_shapes` of a configuration from a file, unless no weight files could be that large.

    Args:
        config: the configuration.
        held: public tensors in the weight files.
        file: where the configuration was read, for messages.

    Raises:
        UserError: it has more layers or experts than there are tensors, or sizes that no computer holds.
    """
    letters = config.hybrid_override_pattern
    if config.num_nextn_predict_layers:
        letters += config.mtp_hybrid_override_pattern
    counts = {"number of layers": len(letters), "n_routed_experts": config.n_routed_experts if "E" in letters else 0}
    for key, count in counts.items():
        if count > held:
            raise UserError(
                f"{file}: {key} is {count}, but the weight files hold {held} tensors in all; one of the two is not of "
                "this model: copy or download both again"
            )
    try:
        return public_shapes(config)
    except (RuntimeError, TypeError):  # torch's, for more bytes or rows than an integer holds
        raise UserError(f"{file}: its sizes are beyond any file; copy or download it again") from None


def placeholder_shapes(config: BackboneConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the zero tensors that a Hugging Face folder holds beside those of `public_names`.

    They are the shared experts of a network that has none; empty for a network that has them, or no mixtures.
    """
    if config.moe_shared_expert_intermediate_size:
        return {}
    with_shared = dataclasses.replace(config, moe_shared_expert_intermediate_size=PLACEHOLDER_WIDTH)
    return {name: shape for name, shape in public_shapes(with_shared).items() if SHARED in name}


def _tensors(config: BackboneConfig) -> list[tuple[str, Place, tuple[int, ...]]]:
    with torch.device("meta"):
        state = Network(config).state_dict()
    found = []
    for parameter, tensor in state.items():
        if parameter == HEAD and config.tie_word_embeddings:
            continue
        shape = tuple(tensor.shape)
        if STACKED not in parameter:
            found.append((parameter, Place(parameter, None), shape))
            continue
        before, after = parameter.split(STACKED)
        for expert in range(shape[0]):
            found.append((f"{before}{STACKED}{expert}.{after}", Place(parameter, expert), shape[1:]))
    return found
