"""The learning rate at its borders, by hand."""

import itertools

import pytest

from modules.errors import UserError
from modules.optim.schedule import ScheduleConfig

SCHEDULE = ScheduleConfig(warmup_tokens=100, decay_tokens=400, minimum_ratio=0.1)
TOTAL = 1000


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0, 0.0),
        (1, 0.01),
        (50, 0.5),
        (100, 1.0),
        (101, 1.0),
        (599, 1.0),
        (600, 1.0),
        (604, 0.91),  # a hundredth into the decay: 0.1 + 0.9 (1 - 0.1)
        (700, 0.55),  # a quarter: 0.1 + 0.9 (1 - 0.5)
        (856, 0.28),  # 64 hundredths: 0.1 + 0.9 (1 - 0.8)
        (1000, 0.1),
        (1200, 0.1),  # a last window may overshoot
    ],
)
def test_values_by_hand(tokens: int, expected: float) -> None:
    assert SCHEDULE.factor(tokens, TOTAL) == pytest.approx(expected, rel=1e-9)


def test_falls_and_never_below_the_minimum() -> None:
    factors = [SCHEDULE.factor(tokens, TOTAL) for tokens in range(600, 1001)]
    assert all(later < earlier for earlier, later in itertools.pairwise(factors))
    assert min(factors) == pytest.approx(0.1)


def test_without_warmup_and_decay_it_is_constant() -> None:
    assert {ScheduleConfig().factor(tokens, TOTAL) for tokens in (0, 1, 500, 1000)} == {1.0}


def test_a_decay_over_the_whole_run() -> None:
    schedule = ScheduleConfig(decay_tokens=TOTAL, minimum_ratio=0.0)
    assert schedule.factor(250, TOTAL) == pytest.approx(0.5)
    assert schedule.factor(TOTAL, TOTAL) == 0.0


def test_must_fit_the_run() -> None:
    SCHEDULE.check_length(500)
    with pytest.raises(UserError, match=r"^model\.schedule: [^\n]*\(500\)[^\n]*data\.total_tokens \(499\)[^\n]*$"):
        SCHEDULE.check_length(499)


@pytest.mark.parametrize(
    ("key", "value"),
    [("warmup_tokens", -1), ("decay_tokens", -1), ("minimum_ratio", -0.1), ("minimum_ratio", 1.1)],
)
def test_a_bad_setting_is_one_line_naming_its_key(key: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^model\.schedule\.{key}: [^\n]*$"):
        ScheduleConfig(**{key: value})
