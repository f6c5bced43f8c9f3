"""The last lines of a run: what it reached, beside what a general compressor makes of the same text."""

import time

from lightning.pytorch import LightningModule, Trainer

from callbacks.console import duration, number
from callbacks.step import StepCallback, step_loop


class Summary(StepCallback):
    """Prints the result when the last step is done."""

    def __init__(self) -> None:
        self._started = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note when and where this start of the program began."""
        self._started, self._first_step = time.perf_counter(), trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary."""
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        tokens = data.tokens_at(trainer.global_step) - data.tokens_at(self._first_step)
        passed = duration(time.perf_counter() - self._started)
        last = step_loop(trainer).last_step
        state = "finished" if trainer.global_step >= last else f"stopped before step {last}; the same command goes on"
        print(f"step {trainer.global_step}: {number(tokens)} tokens in {passed}, {state}", flush=True)
        reached = trainer.callback_metrics.get("validation/bits_per_byte")
        gzip = getattr(data, "gzip_bits_per_byte", None)
        if reached is not None and gzip:
            print(f"held-out text: {float(reached):.3f} bits per byte; gzip -9 needs {gzip:.3f}", flush=True)
        for name, used in data.consumed(trainer.global_step).items():
            print(f"data: {name}: {used.rows:,} rows, {used.epochs:.2f} epochs", flush=True)
        print(f"curves: python -m app.tensorboard --logdir {trainer.default_root_dir}", flush=True)
