"""Tokens per second of training alone: validation, sampling and saving stop the clock."""

import time
from collections.abc import Callable


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
