"""The loop over micro-batches, where Lightning's own does what we do not want.

Lightning counts validation in micro-batches, skips one that was due when a run resumes, and asks every rank in every
micro-batch for SIGTERM. Here validation, checkpoints and signals are callbacks at the end of an optimiser step.
"""

import math
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.seed import isolate_rng

from callbacks.step import StepCallback


class StepLoop(_TrainingEpochLoop):
    """Lightning's loop over micro-batches with a hook at the end of each optimiser step."""

    @property
    def last_step(self) -> int:
        """Optimiser steps of the whole run; known when training starts."""
        steps = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        return steps if self.max_steps == -1 else min(steps, self.max_steps)

    @property
    def is_last_step(self) -> bool:
        """Whether the run has no step left, or is asked to stop (by a time limit, or a callback of the user)."""
        return self._is_training_done or self.trainer.should_stop

    @property
    def done(self) -> bool:
        """Whether to leave the loop: never inside an accumulation window, whose gradients would be lost."""
        return not self._inside_window and super().done

    @property
    def _inside_window(self) -> bool:
        return self.batch_progress.current.ready % self.trainer.accumulate_grad_batches != 0

    def validate(self) -> None:
        """Run a full validation now, without touching the state of training or its random numbers."""
        trainer = self.trainer
        if not trainer.enable_validation:
            return
        connector = trainer._logger_connector
        first_iteration = connector._first_loop_iter
        trainer.validating = True
        call._call_lightning_module_hook(trainer, "on_validation_model_zero_grad")
        with isolate_rng():
            self.val_loop.run()
        trainer.training = True
        connector._first_loop_iter = first_iteration

    def reset(self) -> None:
        """Prepare to start or to resume."""
        super().reset()
        self.batch_progress.is_last_batch = False  # a finished run may have been made longer

    def on_advance_end(self, data_fetcher: Any) -> None:  # noqa: ANN401 (Lightning's signature)
        """Call the callbacks when the micro-batch ended an optimiser step."""
        super().on_advance_end(data_fetcher)
        if self._should_accumulate():
            return
        for callback in self._step_callbacks:
            callback.on_step_end(self.trainer, self.trainer.lightning_module)

    def _on_before_fetch(self) -> None:
        super()._on_before_fetch()
        for callback in self._step_callbacks:
            callback.on_fetch_start(self.trainer)

    @property
    def _step_callbacks(self) -> list[StepCallback]:
        return [callback for callback in self.trainer.callbacks if isinstance(callback, StepCallback)]  # type: ignore[attr-defined]

    def _should_check_val_fx(self, data_fetcher: Any) -> bool:  # noqa: ANN401
        return False

    def _broadcast_sigterm_tensor(self) -> None:
        return


class NoSignals(_SignalConnector):
    """Leaves the signals alone: Lightning's handler runs a collective inside it, and saves nothing."""

    def register_signal_handlers(self) -> None:
        """Register nothing; `callbacks/preemption.py` does."""


def use_step_loop(trainer: Trainer) -> None:
    """Replace the loop and the signal handling of a trainer that has not run yet."""
    old = trainer.fit_loop.epoch_loop
    trainer.fit_loop.epoch_loop = StepLoop(trainer, min_steps=old.min_steps, max_steps=old.max_steps)
    trainer._signal_connector = NoSignals(trainer)
