"""Random number generators in the checkpoint, which Lightning leaves out.

A checkpoint's plain state is written by rank 0 only, so the states of all ranks are gathered into it. A run that goes
on with another number of devices has no state for the new ranks: these start from the seed, which nothing in training
depends on.
"""

import random
from typing import Any

import numpy
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer

from callbacks.step import StepCallback


class RandomState(StepCallback):
    """Saves and restores the generators of Python, NumPy and torch (with each CUDA device's) of every rank."""

    order = -20  # before anybody draws

    def __init__(self) -> None:
        self.restored: list[dict[str, Any]] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the state of every rank to the checkpoint."""
        states: list[Any] = [random_state()]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            dist.all_gather_object(states, random_state())
        checkpoint["random_state"] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the states until training goes on: starting a loader draws a number too."""
        self.restored = checkpoint.get("random_state", [])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Restore this rank's state before the first window, which a loader of ours fetches without drawing."""
        if trainer.global_rank < len(self.restored):
            set_random_state(self.restored[trainer.global_rank])
        self.restored = []


def random_state() -> dict[str, Any]:
    """Return the state of this process's generators as plain values and tensors (loadable with `weights_only`)."""
    version, keys, gauss = random.getstate()
    algorithm, words, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    return {
        "python": [version, list(keys), gauss],
        "numpy": [str(algorithm), [int(word) for word in words], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set this process's generators to what `random_state` returned."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    algorithm, words, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((algorithm, numpy.array(words, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(state["cuda"])
