"""A MODEL ready to be used by a command: where it computes, its tokenizer, and what the user should know of it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from app.errors import UserError

if TYPE_CHECKING:
    from datamodules.tokenizer import Tokenizer
    from modules.backbone.model import Network
    from modules.checkpoints.source import Source

Device = Literal["auto", "cpu", "cuda"]
"""Where to compute; auto: on the GPU if there is one."""


def open_source(model: Path) -> "tuple[Source, Tokenizer | None]":
    """Open a MODEL and its tokenizer, if it brings one; notes on how it was read go to stderr.

    Raises:
        ValueError: it is no MODEL, or damaged.
    """
    from datamodules.tokenizer import Tokenizer
    from modules.checkpoints.source import open_model

    source = open_model(model)
    for note in source.notes:
        print(note, file=sys.stderr)
    return source, None if source.tokenizer_folder is None else Tokenizer.load(source.tokenizer_folder)


def load_network(source: "Source", dtype: str, device: Device) -> "Network":
    """Load the network of an opened MODEL.

    Raises:
        ValueError: the dtype is unknown, a tensor cannot be read, or there is no such device.
    """
    import torch

    from modules.checkpoints.load import load_model

    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise UserError("--device: torch finds no CUDA GPU here; leave it out, or say cpu")
    return load_model(source.path, dtype, "cuda" if has_gpu and device != "cpu" else "cpu").network
