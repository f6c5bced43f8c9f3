"""A side of a comparison lives in a process of its own and does its turns on request.

So that no side runs on what another left behind (memory, threads, compiled kernels), and that a busy machine slows all
alike: the sides take turns, and a ratio is the median of the ratios of neighbouring turns.
"""

import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Return the CPU and wall seconds that a call takes."""
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    return time.process_time() - cpu, time.perf_counter() - wall


def start_together(names: Iterable[str], serve: Callable[..., None], *arguments: Any) -> list["Side"]:
    """Start the processes of sides at the same time; `serve` takes the name before the arguments."""
    sides = [Side(name, serve, name, *arguments, wait=False) for name in names]
    for side in sides:
        side.wait()
    return sides


class Side:
    """The process of a side.

    Args:
        name: what the tables call it.
        serve: main function of the process: takes a connection and `arguments`, sends one message when it is ready,
            then answers requests until it gets None.
        arguments: what `serve` takes behind the connection.
        wait: whether to wait until it is ready; else call `wait` later.
    """

    ready: Any
    """The process's first message."""

    def __init__(self, name: str, serve: Callable[..., None], *arguments: Any, wait: bool = True) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.times: dict[Any, list[tuple[float, float]]] = defaultdict(list)
        """(CPU, wall) seconds of the turns, by request."""
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, *arguments), daemon=True)
        self._process.start()
        other.close()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait until the process is ready."""
        self.ready = self._receive()

    def ask(self, request: Any) -> Any:
        """Return the process's answer."""
        try:
            self._connection.send(request)
        except (BrokenPipeError, ConnectionResetError):
            self._lost()
        return self._receive()

    def turn(self, request: Any) -> None:
        """Ask for a turn and keep the (CPU, wall) seconds that are its answer."""
        self.times[request].append(self.ask(request))

    def median(self, request: Any, column: int) -> float:
        """Return the median of the CPU (0) or wall (1) seconds of a request."""
        return statistics.median(times[column] for times in self.times[request])

    def ratio(self, other: "Side", request: Any, column: int) -> float:
        """Return how many times as long as `other` this side takes: the median of the ratios of neighbouring turns."""
        pairs = zip(self.times[request], other.times[request], strict=True)
        return statistics.median(mine[column] / its[column] for mine, its in pairs)

    def close(self) -> None:
        """End the process."""
        self._connection.send(None)
        self._process.join()

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except (ConnectionResetError, EOFError):
            self._lost()

    def _lost(self) -> None:
        self._process.join()
        code = self._process.exitcode
        raise SystemExit(f"the process of {self.name} ended with exit code {code} (below 0: killed; out of memory?)")
