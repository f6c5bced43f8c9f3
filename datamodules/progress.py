"""Progress of a long job: a bar on a terminal, a plain line every few seconds elsewhere (logs, CI)."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 5.0


class ProgressBar:
    """Shows how much of a job is done; a context manager.

    Args:
        title: what is being done.
        total: amount to do.
        done: amount that was done before (a resumed job).
        unit: what is counted; B for bytes.
    """

    def __init__(self, title: str, total: int, done: int = 0, unit: str = "B") -> None:
        self._title, self._total, self._done, self._unit = title, total, done, unit
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(desc=title, total=total, initial=done, unit=unit, unit_scale=True, leave=False)
        self._last_line = time.monotonic()
        self._told: int | None = None  # how much was done when it was told last

    def __enter__(self) -> "ProgressBar":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar; a job that told how far it is tells that it is done."""
        if self._bar is not None:
            self._bar.close()
        elif self._told not in (None, self._done) and kind is None:
            self._tell()

    def advance(self, amount: int) -> None:
        """Count `amount` more as done."""
        self._done += amount
        if self._bar is not None:
            self._bar.update(amount)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._tell()

    def _tell(self) -> None:
        share = self._done / self._total if self._total else 1.0
        amounts = f"{self._done:,} of {self._total:,} {self._unit}"
        if self._unit == "B":
            amounts = f"{self._done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB"
        self._told = self._done
        print(f"{self._title}: {amounts} ({share:.0%})", file=sys.stderr, flush=True)
