"""Is the run fast, and if not, why: MFU (of GPUs), where the time of a step goes, memory.

Every part of a step is told apart by the hooks between them, on the clock of the device that does the work. On CUDA the
host only queues work, so its clock says nothing about the parts of a step: there a moment is an event in the queue, and
the time between two events is what the device itself spent, waiting for data included. Events are read when the device
has passed them, at a later reading, so that nobody waits for it.

What is shown is the mean over the ranks, but for the share of the step spent waiting for data and for memory: there the
worst rank counts, because all others wait for it, or the run ends with it.
"""

import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.peak import Peak, combine, find_peak, format_shares
from callbacks.step import StepCallback, data, gather, is_due, stage
from modules.backbone.flops import training_flops_per_token
from modules.batch import Progress, Window
from modules.precision.formats import Format

DATA_WAIT, FORWARD, BACKWARD, OPTIMIZER, OTHER = "data_wait", "forward", "backward", "optimizer", "other"
STEP = (DATA_WAIT, FORWARD, BACKWARD, OPTIMIZER, OTHER)
"""Parts of a step. The optimiser's includes clipping; `other` is what is left, above all the writing of metrics."""
BETWEEN = "between"
"""Between two steps, when callbacks run; nothing but the following takes time there."""
PAUSES = ("validation", "sampling", "checkpoint")
"""What stops training."""
GIB = 2**30


class Speed(StepCallback):
    """Logs `speed/...` and `memory/...`.

    Args:
        every_n_steps: Optimiser steps between points (>= 1).
    """

    order = -10  # table and console tell what it finds

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self.flops_per_token = 0.0
        """FLOPs of training per position; known when training starts."""
        self.peaks: dict[Format, Peak] = {}
        """Peak of a device in each format that the model computes in; empty on a CPU (see `peak.py`)."""
        self._peak: float | None = None
        self._read = Progress()  # of the run, at the last point
        self._left = 0  # micro-batches of this step whose backward pass is not done
        self._parts = PartClock(HostClock())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what the speed is compared with, and start the clock."""
        device = trainer.strategy.root_device
        module = stage(pl_module)
        config, depths = module.backbone_config, module.mtp_depths
        self.flops_per_token = training_flops_per_token(config, data(trainer).sequence_length, depths)
        shares = format_shares(module.built_network, depths)
        for number_format in shares:
            peak = find_peak(device, number_format)
            if peak is not None:
                self.peaks[number_format] = peak
        self._peak = combine(shares, self.peaks) if self.peaks else None
        self._read = data(trainer).progress
        self._parts = PartClock(CudaClock() if device.type == "cuda" else HostClock())
        self._parts.enter(BETWEEN)

    def on_fetch_start(self, trainer: Trainer) -> None:
        """Begin to wait for data."""
        self._parts.enter(DATA_WAIT)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Window, batch_idx: int) -> None:
        """Begin the first forward pass."""
        self._left = len(batch.micro_batches)
        self._parts.enter(FORWARD)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Begin the backward pass."""
        self._parts.enter(BACKWARD)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the next forward pass, or clipping and the optimiser's step."""
        self._left -= 1
        self._parts.enter(FORWARD if self._left else OPTIMIZER)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Window, batch_idx: int
    ) -> None:
        """End the optimiser's step."""
        self._parts.enter(OTHER)

    def on_step_end(self, trainer: Trainer, module: LightningModule) -> None:
        """End the step; log if it is due."""
        self._parts.enter(BETWEEN)
        if is_due(self.every_n_steps, trainer):
            stage(module).metrics.record_all(self._measure(trainer))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training stops for a validation."""
        self._parts.enter("validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The other callbacks' turn: above all samples are written."""
        self._parts.enter("sampling")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]) -> None:
        """Training stops for a checkpoint."""
        self._parts.enter("checkpoint")

    def describe(self) -> list[tuple[str, str]]:
        """Return lines (name, text) for the table at the start."""
        lines = [
            ("peak", f"{kind} {peak.flops / 1e12:.3g} TFLOP/s a device ({peak.source})")
            for kind, peak in self.peaks.items()
        ]
        return [*lines, ("work", f"{self.flops_per_token / 1e9:.3g} GFLOP a token, forward and backward pass")]

    def _measure(self, trainer: Trainer) -> dict[str, float]:
        """Return the metrics of the steps since the last call; all ranks call this."""
        times, seconds = self._parts.read()
        own = {part: seconds.get(part, 0.0) / max(times[OPTIMIZER], 1) for part in (*STEP, *PAUSES)} | memory(trainer)
        ranks = [dict(zip(own, values, strict=True)) for values in gather([*own.values()], trainer)]
        if not all(sum(rank[part] for part in STEP) for rank in ranks):  # no step of a GPU is known to be done yet
            return {}
        mean = {part: sum(rank[part] for rank in ranks) / len(ranks) for part in (*STEP, *PAUSES)}
        metrics = {f"speed/seconds/{part}": value for part, value in mean.items()}
        metrics["speed/data_wait_share"] = max(rank[DATA_WAIT] / sum(rank[part] for part in STEP) for rank in ranks)
        metrics["speed/pause_share"] = sum(mean[part] for part in PAUSES) / sum(mean.values())
        if self._peak is not None:
            done, before = data(trainer).progress, self._read
            flops = self.flops_per_token * (done.tokens - before.tokens) / (done.steps - before.steps)
            self._read = done
            metrics["speed/mfu"] = flops / (sum(mean[part] for part in STEP) * trainer.world_size * self._peak)
        return metrics | {name: max(rank[name] for rank in ranks) for name in memory(trainer)}


def memory(trainer: Trainer) -> dict[str, float]:
    """Return what this process holds of the host's memory and has held at most of the GPU's, in GiB."""
    found = {"memory/host_gib": resident_bytes() / GIB}
    device = trainer.strategy.root_device
    if device.type == "cuda":
        found["memory/gpu_peak_allocated_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        found["memory/gpu_peak_reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
    return found


def resident_bytes() -> int:
    """Return the host memory of this process in bytes: what it holds (Linux), or the most it has held (macOS)."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Clock(Protocol):
    """Notes moments and tells how far apart they are."""

    def now(self) -> Any:
        """Return this moment."""
        ...

    def is_past(self, moment: Any) -> bool:
        """Return whether a moment has come (on CUDA the host runs ahead of it)."""
        ...

    def seconds(self, start: Any, end: Any) -> float:
        """Return the seconds between two moments that are past."""
        ...


class HostClock:
    """The clock of a device that computes while the program waits: a CPU."""

    def now(self) -> float:
        """See `Clock`."""
        return time.perf_counter()

    def is_past(self, moment: float) -> bool:
        """See `Clock`."""
        return True

    def seconds(self, start: float, end: float) -> float:
        """See `Clock`."""
        return end - start


class CudaClock:
    """Events in the queue of the current CUDA stream."""

    def now(self) -> torch.cuda.Event:
        """See `Clock`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def is_past(self, moment: torch.cuda.Event) -> bool:
        """See `Clock`."""
        return moment.query()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """See `Clock`."""
        return start.elapsed_time(end) / 1000


class PartClock:
    """Adds up the time spent in each of several parts that follow each other without a gap.

    Args:
        clock: notes the moments at which parts begin.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._begun: list[tuple[str, Any]] = []

    def enter(self, part: str) -> None:
        """Begin a part, and thereby end the one before."""
        self._begun.append((part, self._clock.now()))

    def read(self) -> tuple[Counter[str], dict[str, float]]:
        """Return (how often each part has ended, its seconds) since the last reading, as far as that is past."""
        times: Counter[str] = Counter()
        seconds: dict[str, float] = {}
        done = 0
        while done + 1 < len(self._begun) and self._clock.is_past(self._begun[done + 1][1]):
            (part, start), (_, end) = self._begun[done : done + 2]
            times[part] += 1
            seconds[part] = seconds.get(part, 0.0) + self._clock.seconds(start, end)
            done += 1
        del self._begun[:done]
        return times, seconds
