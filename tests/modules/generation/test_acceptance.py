"""Counts against their definition, and the predicted gain against a simulation of rounds."""

import math
import random

import pytest

from modules.generation.acceptance import Acceptance, Costs, best_draft_tokens, expected_length, predicted_gain

ACCEPTED = [0, 1, 2, 3, 3, 1, 0, 2]


def test_counts() -> None:
    found = Acceptance.of(ACCEPTED, 3)
    assert found.kept == (2, 2, 2, 2)
    assert found.verifications == 8
    assert found.length == pytest.approx(1 + sum(ACCEPTED) / 8)
    for place, (share, rate) in enumerate(zip(found.shares, found.rates, strict=True), 1):
        kept = sum(count >= place for count in ACCEPTED)
        assert share == pytest.approx(kept / 8)
        assert rate == pytest.approx(kept / sum(count >= place - 1 for count in ACCEPTED))
    assert found.metrics() == pytest.approx(
        {
            "acceptance_length": 2.5,
            "draft_acceptance_1": 0.75,
            "draft_acceptance_2": 2 / 3,
            "draft_acceptance_3": 0.5,
        }
    )
    assert found.lines() == [
        "speculative decoding: 2.50 tokens a verification (8 verifications of 3 drafts each)",
        "  draft 1:  75.0% kept",
        "  draft 2:  50.0% kept, 66.7% of those whose drafts before were",
        "  draft 3:  25.0% kept, 50.0% of those whose drafts before were",
    ]


def test_rates_count_rounds_that_got_that_far() -> None:
    rates = Acceptance.of([0, 1, 3, 3], 3).rates
    assert rates == [3 / 4, 2 / 3, 1.0]
    assert expected_length(rates, 3) == pytest.approx(1 + (0 + 1 + 3 + 3) / 4)
    assert expected_length(rates, 1) == 1.75


def test_what_never_happened_is_unknown() -> None:
    assert Acceptance.of([], 2).metrics() == {}
    assert Acceptance.of([], 2).lines() == ["speculative decoding: no verification"]
    never = Acceptance.of([0, 0], 2)
    assert never.shares == [0, 0]
    assert never.rates[0] == 0
    assert math.isnan(never.rates[1])
    assert never.metrics() == {"acceptance_length": 1.0, "draft_acceptance_1": 0.0}
    assert never.lines()[-1] == "  draft 2:   0.0% kept"


RATES = [0.7, 0.6, 0.5]
COSTS = Costs(plain=3.0, rounds={1: 3.9, 2: 4.5, 3: 5.1})


def test_predicted_gain_is_that_of_simulated_rounds() -> None:
    source = random.Random(0)
    for length in (1, 2, 3):
        tokens = seconds = 0.0
        for _ in range(20_000):
            kept = next((place for place in range(length) if source.random() >= RATES[place]), length)
            tokens += kept + 1
            seconds += 0.5 + 0.4 * (length - 1) + 3.2 + 0.2 * length
        assert expected_length(RATES, length) == pytest.approx(tokens / 20_000, rel=0.02)
        assert predicted_gain(COSTS, RATES, length) == pytest.approx(tokens * 3.0 / seconds, rel=0.02)


@pytest.mark.parametrize(
    ("rates", "best"),
    [(RATES, 2), ([0.7, 0.3, 0.3], 1), ([0.9] * 3, 3), ([0.2, 0.9, 0.9], 0), ([0.7], 1), ([0.7, math.nan, 0.5], 1)],
)
def test_the_best_length_has_the_largest_gain_or_none_has_any(rates: list[float], best: int) -> None:
    gains = {0: 1.0} | {length: predicted_gain(COSTS, rates, length) for length in (1, 2, 3) if length <= len(rates)}
    known = {length: gain for length, gain in gains.items() if not math.isnan(gain)}
    assert best_draft_tokens(COSTS, rates) == best == max(known, key=lambda length: known[length])
