"""The wish that a run should stop: Ctrl-C or a scheduler's signal, noted from the first moment of the program on.

Until the first step begins there is nothing to save, and the program leaves at once. From then on the handler only
notes the signal; `callbacks/preemption.py` saves at the end of the step. A second Ctrl-C stops at once then too: what
is on the disk is complete. Imports nothing slow, for the handler must be there before torch is imported.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}
"""Signal -> what a program returns that it ended (128 + its number). SIGUSR1 is a scheduler's warning of SIGTERM."""
SAME_WISH_SECONDS = 1.0
"""A Ctrl-C that follows a signal sooner is no second one: torchrun passes on what the terminal sent to all."""
STARTED_BY = "SUPERBOLT_STARTED_BY"
"""Environment variable: the process that starts the other ones of a run, and ends them."""


class StopRequest:
    """Listens to the signals that end a program; there is one in a process (`STOP`)."""

    def __init__(self) -> None:
        self.name: str | None = None
        """The signal that came; None: none did."""
        self.exit_code = 0
        self.can_save = False
        """Whether a step is under way, at whose end the run is saved."""
        self.before_leaving: list[Callable[[], None]] = []
        """What is called, the last one first, before the process leaves without saving."""
        self.started = time.monotonic()
        self._received = 0.0
        self._process = 0

    def listen(self) -> None:
        """Take over the signals."""
        self.started, self._process = time.monotonic(), os.getpid()
        for number in EXIT_CODES:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loader's worker inherits the handler; its end is the main process's affair
        name, now, again = signal.Signals(number).name, time.monotonic(), self.name is not None
        if not again:
            self.name, self.exit_code, self._received = name, EXIT_CODES[signal.Signals(number)], now
        if not self.can_save:
            line = f"interrupted by {name}; the same command goes on from what is on the disk, or starts anew"
            self._leave(number, line)
        elif not again:
            _say(f"{name}: the run is saved at the end of this step; Ctrl-C stops it at once, without saving")
        elif number == signal.SIGINT and now - self._received > SAME_WISH_SECONDS:
            self._leave(number, f"stopped at once by a second signal, {name}; the newest checkpoint is complete")

    def _leave(self, number: int, line: str) -> None:
        if os.environ.get(STARTED_BY) == str(os.getppid()):
            os.kill(os.getppid(), number)  # it ends this process, or saves; Lightning kills it where this one leaves
            return
        for action in reversed(self.before_leaving):
            action()
        _end_children()
        _say(line)
        os._exit(self.exit_code)  # an exception could be swallowed by what it interrupts, or wait for other threads


STOP = StopRequest()


def _end_children() -> None:
    """End worker processes and what is shared with them, as Python does at its own exit: else it is told as a leak."""
    if "multiprocessing.util" in sys.modules:
        from multiprocessing import active_children, util

        for child in active_children():
            child.terminate()
        util._run_finalizers(0)  # type: ignore[attr-defined]


def _say(line: str) -> None:
    """Write a line to stderr, of the first process only; a handler must not enter a buffered stream."""
    rank = next((os.environ[key] for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if key in os.environ), "0")
    if rank == "0":
        os.write(2, f"{line}\n".encode())
