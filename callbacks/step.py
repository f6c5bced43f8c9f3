"""The hook of our callbacks: once per optimiser step, when everything about the step is done and written.

Lightning's own `on_train_batch_end` runs before the step's metrics reach the logger and while its counters still say
that the batch is unfinished. A checkpoint taken there loses the step's point in TensorBoard if the run is killed, and
skips a validation that was due. `on_step_end` runs after both, in the order of the callbacks.
"""

from typing import Protocol, cast

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from modules.errors import UserError


class StepLoop(Protocol):
    """What callbacks use of the loop over steps (`app/loop.py`)."""

    @property
    def last_step(self) -> int:
        """Optimiser steps of the whole run; known when training starts."""
        ...

    @property
    def is_last_step(self) -> bool:
        """Whether the run has no step left, or is asked to stop."""
        ...

    def validate(self) -> None:
        """Run a full validation now, without touching the state of training."""
        ...


class StepCallback(Callback):
    """A callback that is also called at the end of each optimiser step, and when data are asked for."""

    def on_fetch_start(self, trainer: Trainer) -> None:
        """Run before the loader is asked for a micro-batch: training goes on, whatever callbacks did before."""

    def on_step_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Run after an optimiser step; `trainer.global_step` counts it already."""


def step_loop(trainer: Trainer) -> StepLoop:
    """Return the loop over steps of a trainer."""
    return cast(StepLoop, trainer.fit_loop.epoch_loop)


def is_due(every_n_steps: int, trainer: Trainer) -> bool:
    """Return whether something done every `every_n_steps` steps, and at the last one, is due now."""
    return trainer.global_step % every_n_steps == 0 or step_loop(trainer).is_last_step


def begins_due_step(every_n_steps: int, trainer: Trainer, batch_idx: int) -> bool:
    """Return whether a micro-batch begins a step that is looked at: every `every_n_steps`, the first and the last."""
    step = trainer.global_step + 1
    due = step % every_n_steps == 0 or step in (1, step_loop(trainer).last_step)
    return due and batch_idx % trainer.accumulate_grad_batches == 0


def check_interval(value: int, key: str) -> int:
    """Return an interval in steps, or raise a ValueError that names its key if it is below 1."""
    if value < 1:
        raise UserError(f"{key} is {value}: it counts optimiser steps and must be at least 1")
    return value


def gather(values: list[float], trainer: Trainer) -> list[list[float]]:
    """Return the numbers of every rank, in the order of the ranks; all ranks call this (on a GPU it waits for it)."""
    if trainer.world_size == 1:
        return [values]
    own = torch.tensor(values, dtype=torch.float64, device=trainer.strategy.root_device)
    table = [torch.empty_like(own) for _ in range(trainer.world_size)]
    dist.all_gather(table, own)
    return torch.stack(table).tolist()
