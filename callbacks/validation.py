"""When the model is validated: before the first step, every so many optimiser steps, and after the last.

Lightning's own interval does it; it has no validation before training, nor one after a last step between two.
"""

from lightning.pytorch import LightningModule, Trainer

from callbacks.step import StepCallback, check_interval, step_loop


class Validation(StepCallback):
    """Validates the model while it trains.

    Args:
        every_n_steps: Optimiser steps between validations (>= 1); one runs before the first step, one after the last.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        self.every_n_steps = check_interval(every_n_steps, "validation.every_n_steps")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the interval."""
        trainer.val_check_interval = self.every_n_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the untrained model; a resumed run has done so already."""
        if trainer.global_step == 0:
            step_loop(trainer).validate()

    def on_step_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Let Lightning validate after the last step too: it does where a run is asked to stop."""
        trainer.should_stop |= step_loop(trainer).is_last_step
