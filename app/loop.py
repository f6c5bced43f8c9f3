"""The loop over windows, where Lightning's own does not do what we want.

Lightning's batch is a window, its step an optimiser step. What is added are hooks at the end of a step, one of them
behind the validation that was due: a checkpoint taken there neither repeats nor misses a point of a curve. What is
taken away is its question to every rank in every step for SIGTERM (`callbacks/preemption.py` asks without waiting).
"""

from contextlib import nullcontext
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.seed import isolate_rng

from callbacks.step import StepCallback


class StepLoop(_TrainingEpochLoop):
    """Lightning's loop over windows with a hook at the end of each."""

    @property
    def last_step(self) -> int:
        """Optimiser steps of the whole run; known when training starts."""
        steps = int(self.trainer.num_training_batches)
        return steps if self.max_steps == -1 else min(steps, self.max_steps)

    @property
    def is_last_step(self) -> bool:
        """Whether the run has no step left, or is asked to stop (by a time limit, or a callback of the user)."""
        return self._is_training_done or self.trainer.should_stop

    def validate(self) -> None:
        """Validate before the first step."""
        trainer = self.trainer
        if trainer.enable_validation:
            trainer.validating = True
            with isolate_rng():
                self.val_loop.run()
            trainer.training = True

    def reset(self) -> None:
        """Prepare to start or to resume."""
        super().reset()
        self.batch_progress.is_last_batch = False  # a finished run may have been made longer
        self.restarting = False  # a run is saved behind the validation of its step: nothing is to be made up for

    def on_advance_end(self, data_fetcher: Any) -> None:
        """Call the callbacks before and after the validation, if one is due; it leaves random numbers alone."""
        for callback in self._step_callbacks:
            callback.on_step_end(self.trainer, self.trainer.lightning_module)
        with isolate_rng() if self._should_check_val_fx(data_fetcher) else nullcontext():
            super().on_advance_end(data_fetcher)
        for callback in self._step_callbacks:
            callback.on_step_closed(self.trainer, self.trainer.lightning_module)

    def _on_before_fetch(self) -> None:
        super()._on_before_fetch()
        for callback in self._step_callbacks:
            callback.on_fetch_start(self.trainer)

    @property
    def _step_callbacks(self) -> list[StepCallback]:
        return [callback for callback in self.trainer.callbacks if isinstance(callback, StepCallback)]  # type: ignore[attr-defined]

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
