"""A network from a MODEL: built on the meta device, filled tensor by tensor, so that the peak is model plus one tensor.

What is fp32 always (norms, router, A_log, D, dt_bias, convolution) is so in memory whatever the file holds.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from modules.backbone.initialization import local_rows
from modules.backbone.model import Network
from modules.checkpoints.names import EMBEDDING, HEAD, public_names
from modules.checkpoints.source import Source, open_model
from modules.precision.formats import Format
from modules.precision.linear import FormattedModule

DTYPES: dict[str, Format | None] = {"auto": None, "fp32": "fp32", "bf16": "bf16"}


@dataclass(frozen=True)
class Model:
    """A network and where it came from."""

    network: Network
    """In eval mode, without gradients."""
    source: Source
    """The folder."""


def load_model(path: Path | str, dtype: str = "auto", device: torch.device | str = "cpu") -> Model:
    """Load a MODEL for inference.

    Args:
        path: see `open_model`.
        dtype: format of matrix products and of the weights they read: `auto` takes each tensor's own (bf16 in bf16,
            all else in fp32), or fp32, or bf16.
        device: where the network lives.

    Raises:
        ValueError: the folder is no MODEL or damaged, or the dtype is unknown.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} must be one of {', '.join(DTYPES)}")
    source = open_model(Path(path))
    with torch.device("meta"):
        network = Network(source.config)
    _set_formats(network, source, DTYPES[dtype])
    network.to_empty(device=device)
    network.tie_weights()
    network.eval().requires_grad_(False)
    load_weights(network, source)
    return Model(network, source)


@torch.no_grad()
def load_weights(network: Network, source: Source) -> None:
    """Fill a network with the tensors of a MODEL, in the network's own dtypes; a rank keeps only what it holds.

    Args:
        network: materialised, sharded along dimension 0 or not.
        source: the MODEL; holds all tensors of the network (it may have an MTP block more).

    Raises:
        ValueError: a tensor cannot be read or holds values that are not finite.
    """
    state = network.state_dict()
    for name, place in public_names(network.config).items():
        target = state[place.parameter]
        local = target.to_local() if isinstance(target, DTensor) else target
        rows = local_rows(target)
        if place.expert is None:
            _take(local, rows, source.read(name))  # not held by a name here: the next one would be read beside it
        elif place.expert in rows:
            local[rows.index(place.expert)].copy_(source.read(name))


def _take(local: Tensor, rows: list[int], tensor: Tensor) -> None:
    """Copy the rows that this rank holds."""
    local.copy_(tensor if len(rows) == len(tensor) else tensor[rows])


def _set_formats(network: Network, source: Source, chosen: Format | None) -> None:
    """Set each module's format and its weight's dtype on the meta device."""
    stored: dict[str, set[torch.dtype]] = {}
    for name, place in public_names(source.config).items():
        stored.setdefault(place.parameter, set()).add(source.tensors[name].dtype)
    if source.config.tie_word_embeddings:
        stored[HEAD] = stored[EMBEDDING]
    for name, module in network.named_modules():
        if isinstance(module, FormattedModule):
            own: Format = "bf16" if stored[f"{name}.weight"] == {torch.bfloat16} else "fp32"
            module.format = chosen or own
            module.to(module.compute_dtype)
