import pickle
import random
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from datamodules.text.mixture import (
    LANES,
    EpochOrder,
    Mixture,
    MixturePhase,
    Schedule,
    hash64,
    integer_shares,
    permutation,
)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_every_prefix_of_a_schedule_is_within_one_of_the_exact_shares(count: int):
    generator = random.Random(count)
    for _ in range(10):
        weights = [round(generator.uniform(0.01, 1) ** 3 + 0.001, 3) for _ in range(count)]
        schedule = Schedule(weights)
        period = len(schedule.order)
        exact = [Fraction(str(weight)) / sum(Fraction(str(w)) for w in weights) for weight in weights]
        counts = [0] * count
        for draw, source in enumerate(schedule.order[:3000], start=1):
            counts[source] += 1
            assert all(abs(n - draw * share) < 1 for n, share in zip(counts, exact, strict=True))
        assert np.bincount(schedule.order, minlength=count).tolist() == [int(share * period) for share in exact]


def test_draws_and_counts_equal_a_plain_count_over_many_periods():
    schedule = Schedule([0.5, 0.3, 0.2])
    assert len(schedule.order) == 10
    sources, earlier = schedule.draw(np.arange(1000))
    seen = Counter()
    for draw, (source, before) in enumerate(zip(sources.tolist(), earlier.tolist(), strict=True)):
        assert schedule.counts(draw).tolist() == [seen[0], seen[1], seen[2]]
        assert before == seen[source]
        seen[source] += 1


def test_weights_too_fine_for_a_period_are_rounded_and_no_source_is_lost():
    shares = integer_shares([0.123456789, 0.876543211, 1e-9])
    assert sum(shares) <= 65537
    assert shares[2] == 1
    assert shares[0] / sum(shares) == pytest.approx(0.123456789, abs=2e-5)
    assert integer_shares([1 / 4, 3 / 4]) == [1, 3]
    assert integer_shares([7, 7]) == [1, 1]


@pytest.mark.parametrize("chunk_rows", [[1], [5, 3, 9, 1], [4] * 200, [*range(1, 90)]])
def test_an_epoch_has_every_row_once(chunk_rows: list[int]):
    order = EpochOrder("a", np.array(chunk_rows), seed=3)
    rows = sum(chunk_rows)
    epochs = [order.locate(np.full(rows, epoch), np.arange(rows)).tolist() for epoch in (0, 1, 7)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    if rows > 10:
        assert epochs[0] != epochs[1] != epochs[2]
        other = EpochOrder("b", np.array(chunk_rows), seed=3).locate(np.zeros(rows, dtype=int), np.arange(rows))
        assert other.tolist() != epochs[0]
    # a single place asked alone, from a copy sent to another process
    copy = pickle.loads(pickle.dumps(order))
    assert [int(copy.locate(np.array([7]), np.array([n]))[0]) for n in range(min(rows, 20))] == epochs[2][:20]


def test_rows_come_from_few_chunks_at_a_time_and_neighbours_from_different_ones():
    chunk_rows = np.full(400, 50)
    order = EpochOrder("a", chunk_rows, seed=0)
    chunks = order.locate(np.zeros(20_000, dtype=int), np.arange(20_000)) // 50
    for start in range(0, 20_000, 997):
        stretch = chunks[start : start + LANES]
        assert len(set(stretch.tolist())) > 0.9 * min(LANES, len(stretch))
        assert len(set(chunks[start : start + 10 * LANES].tolist())) <= 2 * LANES


def naive_rows(mixture: Mixture, chunk_rows: dict[str, np.ndarray], phases: list[MixturePhase], rows: int) -> list:
    """Walk through the run draw by draw with a counter per source."""
    orders = {}
    taken = Counter()
    result = []
    start = 0
    for phase in phases:
        names = list(phase.weights)
        schedule = Schedule(list(phase.weights.values()))
        for draw in range((phase.end_step - start) * rows):
            name = names[schedule.order[draw % len(schedule.order)]]
            total = int(chunk_rows[name].sum())
            epoch, place = divmod(taken[name], total)
            if (name, epoch) not in orders:
                order = EpochOrder(name, chunk_rows[name], 11)
                orders[name, epoch] = order.locate(np.full(total, epoch), np.arange(total)).tolist()
            result.append((mixture.names.index(name), epoch, orders[name, epoch][place]))
            taken[name] += 1
        start = phase.end_step
    return result


def test_batches_equal_a_naive_walk_through_all_phases():
    chunk_rows = {"code": np.array([7, 3, 8]), "prose": np.array([5, 5]), "maths": np.array([40, 11, 9, 30])}
    phases = [
        MixturePhase(end_step=9, weights={"code": 0.5, "maths": 0.5}),
        MixturePhase(end_step=10, weights={"prose": 1.0}),
        MixturePhase(end_step=40, weights={"prose": 0.1, "maths": 0.6, "code": 0.3}),
    ]
    mixture = Mixture(chunk_rows, phases, rows_per_step=6, seed=11)
    expected = naive_rows(mixture, chunk_rows, phases, 6)
    steps = list(range(40))
    random.Random(0).shuffle(steps)  # a step needs nothing of the steps before
    taken = Counter()
    for step in steps:
        draws = mixture.draw(step)
        found = list(zip(draws.source.tolist(), draws.epoch.tolist(), draws.row.tolist(), strict=True))
        assert found == expected[6 * step : 6 * step + 6]
    for step in range(41):
        consumed = mixture.consumed(step)
        assert [consumed[name].rows for name in mixture.names] == [taken[n] for n in range(3)]
        assert consumed["code"].epochs == taken[0] / 18
        for source, _, _ in expected[6 * step : 6 * step + 6]:
            taken[source] += 1


def test_a_far_step_costs_no_more_than_the_first():
    mixture = Mixture(
        {"a": np.full(1000, 500), "b": np.full(10, 500)},
        [MixturePhase(end_step=10**12, weights={"a": 0.9, "b": 0.1})],
        rows_per_step=64,
        seed=0,
    )
    start = time.perf_counter()
    draws = mixture.draw(10**11 + 17)
    assert time.perf_counter() - start < 1
    assert draws.epoch.min() > 10**6
    assert mixture.consumed(10**11)["a"].rows == 10**11 * 64 * 9 // 10


def test_what_was_asked_is_what_the_weights_say_step_by_step():
    """The run so far is asked as a whole, and what is read stays within a row of it in every phase."""
    phases = [
        MixturePhase(end_step=5, weights={"a": 3, "b": 1}),
        MixturePhase(end_step=12, weights={"b": 1.0, "c": 4.0}),
    ]
    mixture = Mixture({name: np.array([7, 5]) for name in "abc"}, phases, rows_per_step=4, seed=0)
    asked = Counter()
    for step in range(1, 13):
        shares = {"a": 0.75, "b": 0.25, "c": 0.0} if step <= 5 else {"a": 0.0, "b": 0.2, "c": 0.8}
        for name, share in shares.items():
            asked[name] += 4 * share
        assert mixture.asked(step) == pytest.approx({name: rows / (4 * step) for name, rows in asked.items()})
        for name, read in mixture.consumed(step).items():
            assert abs(read.rows - asked[name]) < 2


def test_permutations_are_permutations_and_do_not_change_over_time():
    for size in (0, 1, 2, 1000):
        assert sorted(permutation(size, 12345)) == list(range(size))
    # written down once: another order here would break the resumption of every running job
    assert permutation(8, 0).tolist() == EXPECTED_0
    assert permutation(8, hash64("rows", 1, "a")).tolist() == EXPECTED_A
    assert hash64("rows", 1, "a") == EXPECTED_HASH


def test_positions_are_uniform():
    first = np.bincount([permutation(10, hash64("key", n))[0] for n in range(5000)], minlength=10)
    assert np.abs(first - 500).max() < 110  # five standard deviations


EXPECTED_0 = [2, 4, 6, 5, 1, 7, 0, 3]
EXPECTED_A = [4, 0, 5, 2, 7, 3, 6, 1]
EXPECTED_HASH = 8024569180868147254
