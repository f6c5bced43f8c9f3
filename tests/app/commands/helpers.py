"""A run on the disk, and mistakes, for the tests of commands that take a MODEL."""

from pathlib import Path

import pytest
from torch import Tensor

from app.__main__ import main
from modules.backbone.model import Network
from tests.modules.checkpoints.folders import public_tensors, write_fit_folder
from tests.modules.helpers import make_network, tiny_config

STEPS = (10, 12, 40)
"""Steps of the checkpoints, of 40; the last 8 are the run's own decay."""


def run_network(number: int) -> Network:
    """The network of a checkpoint of `write_run`, by its place in STEPS."""
    return make_network(tiny_config(vocab_size=288), seed=number)


def run_tensors(number: int) -> dict[str, Tensor]:
    """Its tensors by public name."""
    return public_tensors(run_network(number))


def write_run(folder: Path) -> Path:
    """A run's folder with a checkpoint for each of STEPS."""
    for number, step in enumerate(STEPS):
        write_fit_folder(folder / "checkpoints" / f"step={step:08d}", run_network(number), step, tokenizer=True)
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """Run a command that must fail with one line, and return that line."""
    assert main([*map(str, args)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error
