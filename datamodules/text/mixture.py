"""Which row comes when: a pure function of (seed, step).

A global batch is computed, never drawn from a stream: step s needs nothing of step s - 1. So the state of the data is
one integer, a resumed run jumps to its place at once, and the batches are the same for any number of ranks and workers.

Three closed forms follow each other:

1. *Which source.* Weights become integers a_j with sum A; a table of A draws holds a_j of each source, spread by
   Tijdeman's rule for the chairman assignment problem, and repeats. After any number m of draws each source has had
   m * a_j / A of them, give or take less than one: no luck, no drift.
2. *Which of its rows, in order.* The number i of earlier draws of the source follows from the table; epoch = i // rows.
3. *Which row.* An epoch's order has chunks in an order of their own and rows shuffled inside each chunk, so that a rank
   reads few chunks at a time. It is walked in `LANES` interleaved lanes: neighbours in a batch come from as many places
   of the corpus, and a rank that takes every R-th row of a batch stays with few lanes, hence few chunks.

Orders are those of a hash, splitmix64 of (key, index): a resumed run must see the same one years and library versions
later, which numpy's generators do not promise (NEP 19). Tables are small (at most 65,536 draws a phase; one number per
chunk; one per row of the chunks in use).
"""

import hashlib
import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

LANES = 64
"""Places of an epoch's order that are read side by side (fewer where there are fewer chunks)."""
LARGEST_PERIOD = 65536
"""Most draws after which a schedule repeats; weights finer than one part in this are rounded."""


def hash64(*parts: str | int) -> int:
    """Return a 64-bit hash of strings and integers, the same on every machine."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:8], "little")


def permutation(size: int, key: int) -> np.ndarray:
    """Return a pseudo-random permutation of `range(size)` as int64 [size].

    Args:
        size: number of elements.
        key: 64-bit key; another key gives another permutation.
    """
    with np.errstate(over="ignore"):
        x = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return np.argsort(x, kind="stable")


@dataclass(frozen=True, kw_only=True)
class MixturePhase:
    """A stretch of the run with constant weights."""

    end_step: int
    """First step that does not belong to it."""
    weights: dict[str, float]
    """Weight of each source, > 0, in any unit."""


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The rows of one global batch (G rows)."""

    source: np.ndarray
    """int64 [G]: position of the source in `Mixture.names`."""
    epoch: np.ndarray
    """int64 [G]: how many times the source was read through before."""
    row: np.ndarray
    """int64 [G]: row in the source."""


@dataclass(frozen=True, kw_only=True)
class Consumption:
    """What has been taken from a source."""

    rows: int
    """Rows, repeats counted."""
    epochs: float
    """Rows over the rows of the source."""


class Schedule:
    """A repeating order of sources in which each has its exact share, spread evenly.

    Args:
        weights: weight of each source, > 0.
    """

    def __init__(self, weights: list[float]) -> None:
        self.shares = np.array(integer_shares(weights), dtype=np.int64)
        """int64 [sources]: draws of each source in a period."""
        self.order = np.array(_spread([int(share) for share in self.shares]), dtype=np.int64)
        """int64 [period]: the source of each draw."""
        self._earlier = np.zeros_like(self.order)  # draws of the same source before, inside the period
        for source in range(len(weights)):
            mine = self.order == source
            self._earlier[mine] = np.arange(mine.sum())

    def draw(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the sources of draws and how many draws of the same source came before each.

        Args:
            numbers: int64 [n], numbers of the draws, from 0.
        """
        periods, places = np.divmod(numbers, len(self.order))
        source = self.order[places]
        return source, periods * self.shares[source] + self._earlier[places]

    def counts(self, draws: int) -> np.ndarray:
        """Return int64 [sources]: how often each source is among the first `draws` draws."""
        periods, rest = divmod(draws, len(self.order))
        return periods * self.shares + np.bincount(self.order[:rest], minlength=len(self.shares))


def integer_shares(weights: list[float]) -> list[int]:
    """Return integers in the ratio of the weights, exact where their sum stays within `LARGEST_PERIOD`."""
    fractions = [Fraction(str(weight)) for weight in weights]
    total = sum(fractions)
    parts = [fraction / total for fraction in fractions]
    period = math.lcm(*(part.denominator for part in parts))
    if period <= LARGEST_PERIOD:
        return [int(part * period) for part in parts]
    shares = [max(1, int(part * LARGEST_PERIOD)) for part in parts]
    by_loss = sorted(range(len(parts)), key=lambda n: shares[n] - parts[n] * LARGEST_PERIOD)
    for n in by_loss[: max(0, LARGEST_PERIOD - sum(shares))]:
        shares[n] += 1
    return shares


def _spread(shares: list[int]) -> list[int]:
    """Return an order with `shares[j]` times each j, every prefix within less than one of the exact shares.

    Tijdeman (1980): at draw k only sources that lag by at least 1/(2n-2) may come, and of these the one whose lag would
    first reach 1 - 1/(2n-2). All quantities are multiplied by (2n-2) * sum(shares) to stay in integers.
    """
    count, period = len(shares), sum(shares)
    if count == 1:
        return [0] * period
    scale = 2 * count - 2
    taken = [0] * count
    order = []
    for draw in range(1, period + 1):
        chosen, room = -1, 0
        for source, share in enumerate(shares):
            lag = scale * (share * draw - period * taken[source])
            slack = period * (scale - 1) - lag
            if lag >= period and (chosen < 0 or slack * shares[chosen] < room * share):
                chosen, room = source, slack
        taken[chosen] += 1
        order.append(chosen)
    return order


class EpochOrder:
    """The order in which a source's rows come, epoch by epoch.

    Args:
        name: name of the source; another name gives another order.
        chunk_rows: int64 [chunks], rows in each chunk.
        seed: seed of the run.
    """

    def __init__(self, name: str, chunk_rows: np.ndarray, seed: int) -> None:
        self.rows = int(chunk_rows.sum())
        self._name, self._seed = name, seed
        self._chunk_rows = chunk_rows
        self._first_rows = np.cumsum(chunk_rows) - chunk_rows
        self._lanes = min(LANES, len(chunk_rows))
        self._chunk_order = lru_cache(maxsize=2)(self._order_chunks)
        self._row_order = lru_cache(maxsize=2 * LANES)(self._order_rows)

    def __reduce__(self) -> tuple[type["EpochOrder"], tuple[str, np.ndarray, int]]:
        """Send the arguments, not the caches, to another process."""
        return EpochOrder, (self._name, self._chunk_rows, self._seed)

    def locate(self, epochs: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return int64 [n]: the row at each position of an epoch; over all positions each row comes once.

        Args:
            epochs: int64 [n].
            positions: int64 [n], below `self.rows`.
        """
        lane_rows, longer_lanes = divmod(self.rows, self._lanes)
        lanes, places = positions % self._lanes, positions // self._lanes
        places = places + lanes * lane_rows + np.minimum(lanes, longer_lanes)
        rows = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            mine = np.flatnonzero(epochs == epoch)
            order, ends = self._chunk_order(epoch)
            slots = ends.searchsorted(places[mine], side="right")
            chunks = order[slots]
            inside = places[mine] - ends[slots] + self._chunk_rows[chunks]
            first = self._first_rows[chunks]
            for n, chunk, start, place in zip(*(part.tolist() for part in (mine, chunks, first, inside)), strict=True):
                rows[n] = start + self._row_order(epoch, chunk)[place]
        return rows

    def _order_chunks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = permutation(len(self._chunk_rows), hash64("chunks", self._seed, self._name, epoch))
        return order, np.cumsum(self._chunk_rows[order])

    def _order_rows(self, epoch: int, chunk: int) -> np.ndarray:
        key = hash64("rows", self._seed, self._name, epoch, chunk)
        return permutation(int(self._chunk_rows[chunk]), key).astype(np.int32)


class Mixture:
    """Weighted sources over the phases of a run.

    Args:
        chunk_rows: for each source int64 [chunks], the rows in each of its chunks.
        phases: the phases in order; each names sources of `chunk_rows`.
        rows_per_step: G, rows of a global batch.
        seed: seed of all shuffles.
    """

    def __init__(
        self, chunk_rows: dict[str, np.ndarray], phases: list[MixturePhase], rows_per_step: int, seed: int
    ) -> None:
        self.names = list(chunk_rows)
        self._orders = [EpochOrder(name, rows, seed) for name, rows in chunk_rows.items()]
        self._rows_per_step = rows_per_step
        self._phases = phases
        self._planned: list[_PlannedPhase] = []
        start, before = 0, np.zeros(len(self.names), dtype=np.int64)
        for phase in phases:
            members = np.array([self.names.index(name) for name in phase.weights], dtype=np.int64)
            schedule = Schedule(list(phase.weights.values()))
            self._planned.append(_PlannedPhase(start=start, members=members, schedule=schedule, before=before))
            before = before.copy()
            before[members] += schedule.counts((phase.end_step - start) * rows_per_step)
            start = phase.end_step

    def draw(self, step: int) -> Draws:
        """Return the rows of the global batch of a step."""
        phase = self._phase_of(step)
        first = (step - phase.start) * self._rows_per_step
        member, earlier = phase.schedule.draw(np.arange(first, first + self._rows_per_step, dtype=np.int64))
        source = phase.members[member]
        numbers = phase.before[source] + earlier
        epoch, row = np.zeros_like(numbers), np.zeros_like(numbers)
        for index, order in enumerate(self._orders):
            mine = source == index
            epoch[mine], positions = np.divmod(numbers[mine], order.rows)
            row[mine] = order.locate(epoch[mine], positions)
        return Draws(source=source, epoch=epoch, row=row)

    def consumed(self, step: int) -> dict[str, Consumption]:
        """Return what the first `step` steps take from each source."""
        phase = self._phase_of(max(step - 1, 0))
        rows = phase.before.copy()
        rows[phase.members] += phase.schedule.counts((step - phase.start) * self._rows_per_step)
        return {
            name: Consumption(rows=int(count), epochs=int(count) / order.rows)
            for name, count, order in zip(self.names, rows, self._orders, strict=True)
        }

    def asked(self, step: int) -> dict[str, float]:
        """Return the share of each source that the weights of the phases ask for in the first `step` steps (>= 1)."""
        shares = dict.fromkeys(self.names, 0.0)
        start = 0
        for phase in self._phases:
            steps = max(0, min(step, phase.end_step) - start)
            total = sum(phase.weights.values())
            for name, weight in phase.weights.items():
                shares[name] += steps / step * weight / total
            start = phase.end_step
        return shares

    def _phase_of(self, step: int) -> "_PlannedPhase":
        return next(phase for phase in reversed(self._planned) if step >= phase.start)


@dataclass(frozen=True, kw_only=True)
class _PlannedPhase:
    start: int
    members: np.ndarray
    """int64 [sources of the phase]: their positions in `Mixture.names`."""
    schedule: Schedule
    before: np.ndarray
    """int64 [sources]: rows that earlier phases took."""
