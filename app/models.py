"""What commands that run a MODEL have in common: its tokenizer, and the device it runs on."""

import sys
from pathlib import Path

import torch

from app.options import Device, Dtype, short_dtype
from datamodules.text.corpus import Corpus, is_remote
from datamodules.text.preparation import CORPUS_FILE, prepare_command
from datamodules.tokenizer import Tokenizer
from modules.backbone.model import Network
from modules.checkpoints.load import load_model
from modules.checkpoints.source import ModelFolder, open_model
from modules.errors import UserError
from modules.generation import native


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


def check_same_tokenizer(one: ModelFolder, other: ModelFolder, key: str) -> None:
    """Check that token ids mean the same text to two models; one that brings no tokenizer is taken at its word.

    Args:
        one: a model.
        other: another one.
        key: option or argument that named it, for the message.

    Raises:
        UserError: they do not.
    """
    folders = one.tokenizer_folder, other.tokenizer_folder
    if None not in folders and open_tokenizer(one).fingerprint != open_tokenizer(other).fingerprint:
        raise UserError(
            f"{key}: {other.path} has another tokenizer than {one.path}, so the same ids mean other text to it; take "
            "models that share one"
        )


def open_corpus(path: str, source: ModelFolder) -> Corpus:
    """Open a prepared corpus, given as --data, of a MODEL's tokenizer.

    Raises:
        UserError: it is none, or has another tokenizer.
    """
    if not is_remote(path) and not (Path(path) / CORPUS_FILE).is_file():
        problem = "a file, not" if Path(path).is_file() else "neither a file nor"
        raise UserError(
            f"--data: {path} is {problem} a folder that prepare wrote; make one with: "
            + prepare_command(path, f" --tokenizer {source.path}")
        )
    corpus = Corpus(path)
    if source.tokenizer_folder is not None and open_tokenizer(source).fingerprint != corpus.tokenizer.fingerprint:
        raise UserError(
            f"--data: {path} was prepared with another tokenizer than that of {source.path}; prepare its text with "
            f"--tokenizer {source.path} and another --output"
        )
    if corpus.vocab_size > source.config.vocab_size:
        raise UserError(
            f"--data: {path} has a vocabulary of {corpus.vocab_size:,}, {source.path} one of "
            f"{source.config.vocab_size:,}; prepare the text with the model's tokenizer (prepare --tokenizer)"
        )
    return corpus


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
    if network.backbone.embeddings.weight.device.type == "cpu" and library is None:
        print(f"decoding runs in torch alone, several times slower than in C: {reason}", file=sys.stderr)
