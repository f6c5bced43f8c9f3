"""What our callbacks share: hooks at the end of each optimiser step, their order, what they look at, names of curves.

Lightning's batch is a window, so its hooks at the beginning and end of a batch are those of a step; but when the last
of them runs, its counters still say that the step is unfinished, and the validation that is due is still to come.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, Protocol, cast

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from modules.base import StageModule
from modules.batch import TrainingData
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
        """Validate before the first step."""


class StepCallback(Callback):
    """A callback of ours."""

    order: ClassVar[int] = 0
    """Callbacks run in the order of these numbers; a user's own stand at 50."""

    def on_fetch_start(self, trainer: Trainer) -> None:
        """Run before the loader is asked for a window: training goes on, whatever callbacks did before."""

    def on_step_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Run after an optimiser step; Lightning counts it already."""

    def on_step_closed(self, trainer: Trainer, module: LightningModule) -> None:
        """Run when all that belongs to a step is done, a validation too: time to write metrics and checkpoints."""


def in_order(callbacks: list[Callback]) -> list[Callback]:
    """Return callbacks in the order that they ask for."""
    return sorted(callbacks, key=lambda callback: callback.order if isinstance(callback, StepCallback) else 50)


def stage(module: LightningModule) -> StageModule:
    """Return the LightningModule as what it is: one of our stages."""
    return cast(StageModule, module)


def data(trainer: Trainer) -> TrainingData:
    """Return the datamodule, by the protocol both sides know."""
    return cast(TrainingData, trainer.datamodule)  # type: ignore[attr-defined]


def step_loop(trainer: Trainer) -> StepLoop:
    """Return the loop over steps of a trainer."""
    return cast(StepLoop, trainer.fit_loop.epoch_loop)


def is_due(every_n_steps: int, trainer: Trainer) -> bool:
    """Return whether something done every `every_n_steps` steps, and at the last one, is due now."""
    return trainer.global_step % every_n_steps == 0 or step_loop(trainer).is_last_step


def begins_due_step(every_n_steps: int, trainer: Trainer) -> bool:
    """Return whether a step that begins is looked at: every `every_n_steps`, the first and the last."""
    step = trainer.global_step + 1
    return step % every_n_steps == 0 or step in (1, step_loop(trainer).last_step)


def check_interval(value: int, key: str) -> int:
    """Return an interval in steps, or raise a UserError that names its key if it is below 1."""
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


def curve_name(module: str) -> str:
    """Return the name of a module in curves: `backbone.layers.3.mixer.in_proj` is `layer_03.in_proj`."""
    found = re.fullmatch(r"(backbone|mtp)\.layers\.(\d+)\.(?:mixer\.)?(.+)", module)
    if found is None:
        return module
    block, number, rest = found.groups()
    return f"layer_{int(number):02d}.{rest}" if block == "backbone" else f"mtp_{number}.{rest}"


def worst_and_mean(
    name: str, values: Mapping[str, float], worst: Callable[[Iterable[float]], float]
) -> dict[str, float]:
    """Return the curves `NAME/worst` and `NAME/mean` of values by module, of which there is one at least."""
    return {f"{name}/worst": worst(values.values()), f"{name}/mean": sum(values.values()) / len(values)}


def with_summary(name: str, values: Mapping[str, float], worst: Callable[[Iterable[float]], float]) -> dict[str, float]:
    """Return those, and `NAME/MODULE`; nothing where there is no value."""
    if not values:
        return {}
    return worst_and_mean(name, values, worst) | {f"{name}/{module}": value for module, value in values.items()}
