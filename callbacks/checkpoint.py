"""When the run is saved, and how many checkpoints are kept.

A checkpoint is taken at the end of an optimiser step, after its metrics and a validation that was due: a resumed run
neither repeats nor misses a point of a curve.
"""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer

from callbacks.step import StepCallback, check_interval, data, is_due, stage, step_loop
from modules.base import VALIDATED
from modules.checkpoints import folder
from modules.errors import UserError


@runtime_checkable
class SyncedLogger(Protocol):
    """A logger that can bring its points to the disk: no checkpoint may be newer than the curves."""

    def sync(self) -> None:
        """Do so."""
        ...


class Checkpoint(StepCallback):
    """Saves the run so that it can go on exactly where it was.

    Args:
        every_n_steps: Optimiser steps between checkpoints (>= 1); the last step is always saved.
        keep_last: Number of checkpoints to keep (>= 1); older ones are deleted.
    """

    order = 70  # after the user's own callbacks, whose state belongs to it

    def __init__(self, every_n_steps: int = 100, keep_last: int = 2) -> None:
        self.every_n_steps = check_interval(every_n_steps, "checkpoint.every_n_steps")
        if keep_last < 1:
            raise UserError(f"checkpoint.keep_last is {keep_last}: at least one checkpoint must be kept")
        self.keep_last = keep_last
        self.saved_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what a resumed run has on disk already."""
        self.saved_step = trainer.global_step

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
                name: float(stage(pl_module).metrics[name]) for name in VALIDATED if name in stage(pl_module).metrics
            },
            "devices": trainer.world_size,
            "torch": str(torch.__version__),
        }

    def _remove_old(self, trainer: Trainer, parent: Path) -> None:
        """Keep the newest up to this step; a later one was damaged when the run went back behind it."""
        if trainer.is_global_zero:
            found = folder.checkpoints(parent)
            kept = [path for path in found if folder.step_of(path) <= trainer.global_step][: self.keep_last]
            for path in found:
                if path not in kept:
                    trainer.strategy.remove_checkpoint(path)
