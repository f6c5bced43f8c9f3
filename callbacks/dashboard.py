"""Writes all that others record, and the lines that curves are read against (`app/tensorboard` draws both).

What a run is held against is no measurement of it: its curves are called `reference/...`, so that no one takes the
bits per byte of gzip for those of the model. They are written only where the run has what they are a reference for.
"""

from lightning.pytorch import LightningModule, Trainer

from callbacks.step import StepCallback, is_due, stage
from modules.base import StageModule
from modules.batch import HeldOutText


class Dashboard(StepCallback):
    """Writes the curves, and `reference/...` with each validation.

    Args:
        every_n_steps: Optimiser steps after which everything so far can be seen by others (>= 1).
    """

    order = 60  # after all who record, before a checkpoint: no curve may be older than it

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record what the curves are held against."""
        stage(pl_module).metrics.record_all(references(stage(pl_module)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what a validation before the first step has found."""
        stage(pl_module).write_metrics()

    def on_step_closed(self, trainer: Trainer, module: LightningModule) -> None:
        """Write, and let others see everything up to here whenever that is due."""
        stage(module).write_metrics()
        for logger in trainer.loggers if is_due(self.every_n_steps, trainer) else ():
            logger.save()


def references(module: StageModule) -> dict[str, float]:
    """Return what the curves of a run are held against, by name.

    Returns:
        `reference/gzip_bits_per_byte` of the held-out text, `reference/gradient_clip_norm`, and
        `reference/spike_sigmas`, above which a step is skipped; each where there is one.
    """
    guard, source = module.step_guard.config, module.data
    found = {
        "gzip_bits_per_byte": source.gzip_bits_per_byte() if isinstance(source, HeldOutText) else None,
        "gradient_clip_norm": module.optimizer_config.gradient_clip_norm,
        "spike_sigmas": guard.sigmas if guard is not None else None,
    }
    return {f"reference/{name}": value for name, value in found.items() if value is not None}
