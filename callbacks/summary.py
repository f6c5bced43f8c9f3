"""The last lines of a run: what it reached, beside what a general compressor makes of the same text."""

import time

from lightning.pytorch import LightningModule, Trainer

from callbacks.console import duration, number
from callbacks.step import StepCallback, data, stage, step_loop
from modules.batch import HeldOutText, MixedSources


class Summary(StepCallback):
    """Prints the result when the last step is done."""

    order = 90

    def __init__(self) -> None:
        self._started = 0.0
        self._tokens = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note when and where this start of the program began."""
        self._started, self._tokens = time.perf_counter(), data(trainer).progress.tokens

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary."""
        if not trainer.is_global_zero:
            return
        source = data(trainer)
        tokens = source.progress.tokens - self._tokens
        passed = duration(time.perf_counter() - self._started)
        last = step_loop(trainer).last_step
        state = "finished" if trainer.global_step >= last else f"stopped before step {last}; the same command goes on"
        print(f"step {trainer.global_step}: {number(tokens)} tokens in {passed}, {state}", flush=True)
        reached = stage(pl_module).metrics.get("validation/bits_per_byte")
        gzip = source.gzip_bits_per_byte() if isinstance(source, HeldOutText) else None
        if reached is not None and gzip:
            print(f"held-out text: {float(reached):.3f} bits per byte; gzip -9 needs {gzip:.3f}", flush=True)
        consumed = source.consumed(trainer.global_step) if isinstance(source, MixedSources) else {}
        for name, used in consumed.items():
            print(f"data: {name}: {used.rows:,} rows, {used.epochs:.2f} epochs", flush=True)
        print(f"curves: python -m app.tensorboard --logdir {trainer.default_root_dir}", flush=True)
