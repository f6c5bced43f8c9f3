"""The console: what the run is at, in one readable line every so many steps, and one for each validation.

Plain lines everywhere: they survive log files, pipes and job schedulers, where a bar becomes noise.
"""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from callbacks.step import StepCallback, check_interval, data, is_due, stage, step_loop
from callbacks.throughput import Throughput
from modules.base import VALIDATED
from modules.batch import HeldOutText


class Console(StepCallback):
    """Prints progress and logs `training/tokens_per_second`.

    Args:
        every_n_steps: Optimiser steps between lines, and between points of the curves of speed, memory and data (>= 1).
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = check_interval(every_n_steps, "console.every_n_steps")
        self.throughput = Throughput()
        self._tokens = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where this start of the program begins."""
        self._tokens = data(trainer).progress.tokens

    def on_fetch_start(self, trainer: Trainer) -> None:
        """Start the clock: whatever else a callback did is over."""
        self.throughput.resume()

    def on_step_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop the clock; print a line if it is due."""
        self.throughput.pause()
        step, last, done = trainer.global_step, step_loop(trainer).last_step, data(trainer).progress
        self.throughput.add(done.tokens - self._tokens)
        self._tokens = done.tokens
        if not is_due(self.every_n_steps, trainer):
            return
        speed = self.throughput.read()
        left = self.throughput.seconds_left((last - step) * done.tokens / done.steps)
        metrics = stage(module).metrics
        metrics.record("training/tokens_per_second", speed)
        if trainer.is_global_zero:
            print(progress_line(step, last, metrics, speed, left), flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metrics of a validation during training."""
        if not trainer.is_global_zero or trainer.state.fn != "fit":
            return
        text = data(trainer)
        gzip = text.gzip_bits_per_byte() if isinstance(text, HeldOutText) else None
        print(validation_line(trainer.global_step, stage(pl_module).metrics, gzip), flush=True)


def progress_line(step: int, last: int, metrics: Mapping[str, Any], speed: float, seconds_left: float) -> str:
    """Return the console line of a step.

    Args:
        step: optimiser steps done.
        last: optimiser steps of the run.
        metrics: by name; loss, learning rate, gradient norm, MFU and the share of data wait are shown if there.
        speed: tokens per second.
        seconds_left: estimated time to the end.
    """
    parts = [f"step {step:>{len(str(last))}}/{last} {100 * step / last:5.1f}%"]
    for name, label, form in (
        ("training/loss", "loss", ".4f"),
        ("training/learning_rate", "lr", ".2e"),
        ("training/gradient_norm", "grad", ".2f"),
    ):
        if name in metrics:
            parts.append(f"{label} {float(metrics[name]):{form}}")
    parts.append(f"{number(speed)} tokens/s")
    for name, label in (("speed/mfu", "MFU"), ("speed/data_wait_share", "data wait")):
        if name in metrics:
            parts.append(f"{label} {float(metrics[name]):.1%}")
    return "  ".join([*parts, f"{duration(seconds_left)} left"])


def validation_line(step: int, metrics: Mapping[str, Any], gzip_bits_per_byte: float | None) -> str:
    """Return the console line of a validation after `step` steps."""
    shown = {name.removeprefix("validation/"): metrics[name] for name in VALIDATED if name in metrics}
    text = "  ".join(f"{name.replace('_', ' ')} {float(value):.4f}" for name, value in shown.items())
    if "bits_per_byte" in shown and gzip_bits_per_byte:
        text += f" (gzip -9: {gzip_bits_per_byte:.4f})"
    return f"validation after step {step}: {text}"


def number(value: float) -> str:
    """Return a number with three digits and k, M, G or T: 12345 -> 12.3k."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """Return a duration in its two largest units: 3725 -> 1h02m."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
