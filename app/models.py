"""What commands that run a MODEL have in common: its tokenizer, and the device it runs on."""

import sys
from pathlib import Path

import torch

from app.options import Device, Dtype, short_dtype
from datamodules.tokenizer import Tokenizer
from modules.backbone.model import Network
from modules.checkpoints.load import load_model
from modules.checkpoints.source import ModelFolder, open_model
from modules.errors import UserError
from modules.generation import native
from modules.generation.runner import Runner


def open_source(model: Path) -> ModelFolder:
    """Open a MODEL and say on stderr which checkpoint of a run is taken, and how it was read.

    Raises:
        UserError: it is no MODEL, or damaged.
    """
    source = open_model(model)
    if source.path != model:
        print(f"model: {source.path}", file=sys.stderr)
    say_notes(source)
    return source


def say_notes(source: ModelFolder) -> None:
    """Say on stderr how a MODEL was read."""
    for note in source.notes:
        print(note, file=sys.stderr)


def load_network(source: ModelFolder, dtype: Dtype, device: torch.device) -> Network:
    """Load the network of a MODEL, and say on stderr how it runs if it is quantised.

    Raises:
        UserError: it is damaged, or weights cannot be served as they are quantised.
    """
    model = load_model(source.path, short_dtype(dtype), device)
    if model.note is not None:
        print(f"note: {model.note}", file=sys.stderr)
    return model.network


def open_tokenizer(source: ModelFolder) -> Tokenizer:
    """Load the tokenizer that a MODEL brings.

    Raises:
        UserError: it brings none, or one that has more tokens than the network.
    """
    if source.tokenizer_folder is None:
        raise UserError(f"{source.path} brings no tokenizer; put tokenizer.json and tokenizer_config.json into it")
    tokenizer = Tokenizer.load(source.tokenizer_folder)
    if tokenizer.vocab_size > source.config.vocab_size:
        raise UserError(
            f"{source.tokenizer_folder} has {tokenizer.vocab_size:,} tokens, the model {source.config.vocab_size:,}; "
            "it is the tokenizer of another model"
        )
    return tokenizer


def choose_device(name: Device) -> torch.device:
    """Return the device that `auto` or a name means.

    Raises:
        UserError: the machine has no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda is not available on this machine; leave the option out")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def note_decoding(network: Network) -> None:
    """Say on stderr if decoding has to do without the C code that makes it fast on a CPU."""
    library, reason = native.load()
    if library is not None:
        reason = "that is for plain weights, all in fp32 or all in bf16"
    if network.backbone.embeddings.weight.device.type == "cpu" and Runner(network, 1, 1).native is None:
        print(f"decoding runs in torch alone, several times slower than in C: {reason}", file=sys.stderr)
