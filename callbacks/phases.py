"""Where the time of a step goes, on the clock of the device that does the work.

On CUDA the host only queues work, so its clock says nothing about the parts of a step. There a moment is an event in
the queue: the time between two events is what the device itself spent, waiting for data included. Events are read when
the device has passed them, at a later reading, so that nobody waits for it.
"""

import time
from collections import Counter
from typing import Any, Protocol

import torch


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


class PhaseClock:
    """Adds up the time spent in each of several phases that follow each other without a gap.

    Args:
        clock: notes the moments at which phases begin.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._begun: list[tuple[str, Any]] = []

    def enter(self, phase: str) -> None:
        """Begin a phase, and thereby end the one before."""
        self._begun.append((phase, self._clock.now()))

    def read(self) -> tuple[Counter[str], dict[str, float]]:
        """Return (how often each phase has ended, its seconds) since the last reading, as far as that is past."""
        times: Counter[str] = Counter()
        seconds: dict[str, float] = {}
        done = 0
        while done + 1 < len(self._begun) and self._clock.is_past(self._begun[done + 1][1]):
            (phase, start), (_, end) = self._begun[done : done + 2]
            times[phase] += 1
            seconds[phase] = seconds.get(phase, 0.0) + self._clock.seconds(start, end)
            done += 1
        del self._begun[:done]
        return times, seconds
