"""Light worker processes for preparing data.

Workers are spawned, not forked (a fork of a process with torch's threads can hang), and the functions they run live in
modules that import numpy and tokenizers only, so that a worker starts in a third of a second. A worker ends when its
parent dies, even by kill -9.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TypeVar

from modules.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Mistake:
    """A user's mistake that a worker found."""

    message: str


class Workers:
    """Runs functions over jobs in a number of processes; a context manager.

    Args:
        count: number of processes; 1 runs everything in this one.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        """Return itself; processes start with the first jobs."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes; jobs that have not begun are dropped, and at Ctrl-C those under way are not waited for."""
        if self._pool is not None:
            if kind is not None and not issubclass(kind, Exception):
                for process in multiprocessing.active_children():
                    process.terminate()
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, function: Callable[[Job], Result], jobs: list[Job]) -> Iterator[tuple[int, Result]]:
        """Yield (position of the job, result) as results arrive, in any order.

        Args:
            function: a function of a module (it is sent by name).
            jobs: its arguments.

        Raises:
            UserError: a user's mistake that a job found, or a process that was killed from outside.
        """
        if self._count == 1 or len(jobs) < 2:
            for position, job in enumerate(jobs):
                yield position, function(job)
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._count, mp_context=context, initializer=begin_worker)
        guarded = partial(_call, function)
        positions: dict[Future[Result | _Mistake], int] = {
            self._pool.submit(guarded, job): position for position, job in enumerate(jobs)
        }
        try:
            for future in as_completed(positions):
                result = future.result()
                if isinstance(result, _Mistake):
                    raise UserError(result.message)
                yield positions[future], result
        except BrokenProcessPool:
            raise UserError(
                "workers: a worker process was killed (out of memory?); run the same command again with fewer workers"
            ) from None


def _call(function: Callable[[Job], Result], job: Job) -> "Result | _Mistake":
    try:
        return function(job)
    except UserError as error:
        return _Mistake(str(error))


def begin_worker() -> None:
    """Prepare a process that was just spawned: it leaves Ctrl-C to its parent, and ends when that dies."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
