"""When the run is saved, how many checkpoints are kept, and the random numbers in them, which Lightning leaves out.

A checkpoint is taken at the end of an optimiser step, after its metrics and a validation that was due: a resumed run
neither repeats nor misses a point of a curve. Its plain state is written by rank 0 only, so the random states of all
ranks are gathered into it. A run that goes on with another number of devices has none for the new ranks: these start
from the seed, which nothing in training depends on.
"""

import random
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer

from callbacks.environments import Environments
from callbacks.step import StepCallback, check_interval, data, is_due, stage, step_loop
from modules.base import EXACT_MATCH, VALIDATED
from modules.batch import EvaluatedEnvironments
from modules.checkpoints import folder
from modules.errors import UserError

METRICS = (*VALIDATED, EXACT_MATCH)
"""What the best checkpoint can be chosen by."""


@runtime_checkable
class SyncedLogger(Protocol):
    """A logger that can bring its points to the disk: no checkpoint may be newer than the curves."""

    def sync(self) -> None:
        """Do so."""


class Checkpoint(StepCallback):
    """Saves the run so that it can go on exactly where it was.

    Args:
        every_n_steps: Optimiser steps between checkpoints (>= 1); the last step is always saved.
        keep_last: Number of the newest checkpoints to keep (>= 1); older ones are deleted.
        keep_every_n_steps: Checkpoints of steps that this number divides are kept for good; null: none.
        keep_best: Number of the best checkpoints to keep for good; `checkpoints/best` is a link to the best of all.
            Only those count of whose step the metric was measured.
        best_metric: What is lowest in the best: validation/loss or validation/bits_per_byte; or highest:
            validation/exact_match, where data bring environments.
    """

    order = 70  # after the user's own callbacks, whose state belongs to it

    def __init__(
        self,
        every_n_steps: int = 100,
        keep_last: int = 2,
        keep_every_n_steps: int | None = None,
        keep_best: int = 0,
        best_metric: str = "validation/loss",
    ) -> None:
        self.every_n_steps = check_interval(every_n_steps, "checkpoint.every_n_steps")
        if keep_last < 1:
            raise UserError(f"checkpoint.keep_last is {keep_last}: at least one checkpoint must be kept")
        if keep_every_n_steps is not None:
            check_interval(keep_every_n_steps, "checkpoint.keep_every_n_steps")
            if keep_every_n_steps % every_n_steps:
                raise UserError(
                    f"checkpoint.keep_every_n_steps is {keep_every_n_steps}: make it a multiple of "
                    f"checkpoint.every_n_steps ({every_n_steps}), or there is nothing to keep"
                )
        if keep_best < 0:
            raise UserError(f"checkpoint.keep_best is {keep_best}: it must not be negative; 0 keeps none")
        if best_metric not in METRICS:
            raise UserError(f"checkpoint.best_metric: {best_metric} must be one of {', '.join(METRICS)}")
        self.keep_last, self.keep_every_n_steps = keep_last, keep_every_n_steps
        self.keep_best, self.best_metric = keep_best, best_metric
        self.validated_step = -1
        self.saved_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what a resumed run has on disk already.

        Raises:
            UserError: the best is to be chosen by what these data do not measure.
        """
        source = data(trainer)
        evaluated = isinstance(source, EvaluatedEnvironments) and source.evaluation() is not None
        if self.keep_best and self.best_metric == EXACT_MATCH and not evaluated:
            raise UserError(f"checkpoint.best_metric: {EXACT_MATCH} needs environments in data.init_args.environments")
        self.saved_step = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember of which step the metrics are."""
        self.validated_step = trainer.global_step

    def on_step_closed(self, trainer: Trainer, module: LightningModule) -> None:
        """Save if it is due."""
        if is_due(self.every_n_steps, trainer):
            self.save(trainer)

    def save(self, trainer: Trainer) -> Path:
        """Save the run now, unless this step is saved already; all ranks call this.

        Returns:
            The checkpoint folder.

        Raises:
            OSError: the disk is full; earlier checkpoints are untouched.
        """
        path = folder.step_folder(Path(trainer.default_root_dir), trainer.global_step)
        if self.saved_step != trainer.global_step:
            for logger in trainer.loggers:
                if isinstance(logger, SyncedLogger):
                    logger.sync()
                else:
                    logger.save()
            trainer.save_checkpoint(path, weights_only=False)
            self.saved_step = trainer.global_step
            self._remove_old(trainer, path.parent)
        return path

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say what the folder holds, and which files travel with it."""
        run_folder = Path(trainer.default_root_dir)
        attachments = [run_folder / folder.RUN_CONFIG, data(trainer).tokenizer_folder]
        checkpoint[folder.ATTACHMENTS] = [str(path) for path in attachments if path.exists()]
        checkpoint[folder.ABOUT] = {
            "step": trainer.global_step,
            "last_step": step_loop(trainer).last_step,
            "finished": trainer.global_step >= step_loop(trainer).last_step,
            "tokens": data(trainer).progress.tokens,
            "metrics": {
                name: float(stage(pl_module).metrics[name]) for name in METRICS if name in stage(pl_module).metrics
            },
            "validated": trainer.global_step == self.validated_step,
            "evaluated": any(
                isinstance(callback, Environments) and callback.evaluated_step == trainer.global_step
                for callback in trainer.callbacks  # type: ignore[attr-defined]
            ),
            "order": dict(data(trainer).order),
            "devices": trainer.world_size,
            "torch": str(torch.__version__),
        }

    def _remove_old(self, trainer: Trainer, parent: Path) -> None:
        """Keep what the settings say; all is told from the disk, whatever happened since the run began."""
        if not trainer.is_global_zero:
            return
        found = folder.checkpoints(parent)
        # a later one was damaged when the run went back behind it
        past = [path for path in found if folder.step_of(path) <= trainer.global_step]
        best = self._ranked(past)[: self.keep_best] if self.keep_best else []
        kept = {*past[: self.keep_last], *best}
        if self.keep_every_n_steps is not None:
            kept |= {path for path in past if folder.step_of(path) % self.keep_every_n_steps == 0}
        if best:
            folder.link(parent / folder.BEST, best[0])
        else:
            (parent / folder.BEST).unlink(missing_ok=True)
        for path in found:
            if path not in kept:
                trainer.strategy.remove_checkpoint(path)

    def _ranked(self, found: list[Path]) -> list[Path]:
        """Return the checkpoints of which the metric is known, the best first."""
        if self.best_metric == EXACT_MATCH:
            return folder.best(found, EXACT_MATCH, measured="evaluated", highest=True)
        return folder.best(found, self.best_metric)


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
