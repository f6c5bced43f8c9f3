"""The console: what the run computes on, what it is at, and what it reached.

Plain lines everywhere: they survive log files, pipes and job schedulers, where a bar becomes noise. The table at the
start tells kernels and formats: most slow runs are slow because a kernel is missing, and most surprising numbers come
from a format nobody looked at.
"""

import platform
import shlex
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from callbacks.speed import Speed
from callbacks.step import StepCallback, check_interval, data, is_due, stage, step_loop
from callbacks.text import WIDTH, entry, fold
from modules.base import VALIDATED, StageModule
from modules.batch import HeldOutText, MixedSources
from modules.ops.kernels import kernel_table
from modules.precision.table import adapter_lines, precision_lines


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
        metrics: by name; loss, learning rate, gradient norm, MFU and the share of waiting for data are shown if there.
        speed: tokens per second.
        seconds_left: estimated time to the end.
    """
    parts = [f"step {step:>{len(str(last))}}/{last}", f"{step / last:4.0%}"]
    for name, label, form in (
        ("training/loss", "loss", ".4f"),
        ("training/learning_rate", "lr", ".1e"),
        ("training/gradient_norm", "grad", ".3g"),
    ):
        if name in metrics:
            parts.append(f"{label} {float(metrics[name]):{form}}")
    parts.append(f"{number(speed)} tok/s")
    for name, label in (("speed/mfu", "MFU"), ("speed/data_wait_share", "wait")):
        if name in metrics:
            parts.append(f"{label} {float(metrics[name]):.0%}")
    parts.append(f"{duration(seconds_left)} left")
    while sum(map(len, parts)) + 2 * len(parts) - 2 > WIDTH:
        del parts[-2]  # waiting, then MFU: TensorBoard has them too
    return "  ".join(parts)


def validation_line(
    step: int, metrics: Mapping[str, Any], gzip_bits_per_byte: float | None, name: str = "validation"
) -> str:
    """Return the console line of a validation, or of another evaluation by `name`, after `step` steps."""
    shown = {name.removeprefix("validation/"): metrics[name] for name in VALIDATED if name in metrics}
    text = "  ".join(f"{name.replace('_', ' ')} {float(value):.4f}" for name, value in shown.items())
    if "bits_per_byte" in shown and gzip_bits_per_byte:
        text += f" (gzip -9: {gzip_bits_per_byte:.4f})"
    return f"{name} after step {step}: {text}"


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


class Startup(StepCallback):
    """Prints what is active before training starts.

    Args:
        speed: knows the peak that the speed is compared with, once training starts.
    """

    order = -5

    def __init__(self, speed: Speed) -> None:
        self.speed = speed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table."""
        if trainer.is_global_zero:
            table = start_table(trainer, stage(pl_module)) + self.speed.describe()
            print("\n".join(entry(name, text) for name, text in table), flush=True)


def start_table(trainer: Trainer, module: StageModule) -> list[tuple[str, str]]:
    """Return the lines of the table at the start as (name, text)."""
    device = trainer.strategy.root_device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    table = [
        ("run", str(trainer.default_root_dir)),
        ("device", f"{trainer.world_size} x {device.type} ({kind}), {torch.get_num_threads()} threads"),
        ("torch", str(torch.__version__)),
    ]
    table += [("kernel", f"{operation}: {kernel}: {state}") for operation, kernel, state in kernel_table()]
    table += [("weights", line) for line in module.initial_weights]
    lines = precision_lines(module.precision_table, module.built_network, module.mtp_depths, by_module=False)
    table += [("precision", line) for line in lines]
    if module.lora is not None:
        table += [("adapters", line) for line in adapter_lines(module.built_network)]
    count = sum(parameter.numel() for parameter in module.parameters())
    return [*table, ("parameters", f"{count:,}"), ("steps", f"{step_loop(trainer).last_step:,}")]


class Summary(StepCallback):
    """Prints the result when the last step is done.

    Args:
        tensorboard: command that shows the curves of a `--logdir`.
        next_start: what goes on with a run that stopped before its end.
    """

    order = 90

    def __init__(self, tensorboard: str, next_start: str = "the same command") -> None:
        self._tensorboard, self._next_start = tensorboard, next_start
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
        state = "finished" if trainer.global_step >= last else f"stopped before step {last}; {self._next_start} goes on"
        print(f"step {trainer.global_step}: {number(tokens)} tokens in {passed}, {state}", flush=True)
        reached = stage(pl_module).metrics.get("validation/bits_per_byte")
        gzip = source.gzip_bits_per_byte() if isinstance(source, HeldOutText) else None
        if reached is not None and gzip:
            print(f"held-out text: {float(reached):.3f} bits per byte; gzip -9 needs {gzip:.3f}", flush=True)
        consumed = source.consumed(trainer.global_step) if isinstance(source, MixedSources) else {}
        for name, used in consumed.items():
            print(fold(f"data: {name}: {used.rows:,} rows, {used.epochs:.2f} epochs"), flush=True)
        print(f"curves: {self._tensorboard} --logdir {shlex.quote(trainer.default_root_dir)}", flush=True)


class Throughput:
    """A stop-watch over training steps; it stands still at first.

    Args:
        clock: returns seconds; replaced in tests.
    """

    SMOOTHING = 0.7
    """Weight of the past in the smoothed speed from which the remaining time is estimated."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started: float | None = None
        self._seconds = 0.0
        self._tokens = 0
        self._smoothed: float | None = None

    def pause(self) -> None:
        """Stop the clock, which runs."""
        assert self._started is not None
        self._seconds += self._clock() - self._started
        self._started = None

    def resume(self) -> None:
        """Start the clock unless it runs; what passed since `pause` does not count."""
        if self._started is None:
            self._started = self._clock()

    def add(self, tokens: int) -> None:
        """Count the tokens of a finished step."""
        self._tokens += tokens

    def read(self) -> float:
        """Return tokens per second since the last reading, and start a new interval; call while paused."""
        speed = self._tokens / max(self._seconds, 1e-9)
        past = speed if self._smoothed is None else self._smoothed
        self._smoothed = self.SMOOTHING * past + (1 - self.SMOOTHING) * speed
        self._tokens, self._seconds = 0, 0.0
        return speed

    def seconds_left(self, tokens: float) -> float:
        """Return how long `tokens` more will take at the smoothed speed; `read` was called before."""
        assert self._smoothed is not None
        return tokens / max(self._smoothed, 1e-9)
