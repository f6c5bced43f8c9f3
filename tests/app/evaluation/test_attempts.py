"""Figures of attempts against brute force and textbook values."""

import itertools
import math
import statistics

import pytest

from app.evaluation.attempts import Estimate, details, estimate, figures, mean_of, pass_at_k, table
from modules.batch import Attempt, Judgement, Problem


def attempt(reward: float = 0.0, failure: str | None = None, ended: bool = True) -> Attempt:
    return Attempt(
        problem=Problem(messages=[{"role": "user", "content": "1 + 1?"}], answer="2"),
        dialogue=[{"role": "assistant", "content": "2"}],
        reply="2",
        judgement=Judgement(reward=reward, reason="why", failure=failure),
        ended=ended,
    )


@pytest.mark.parametrize("samples", range(1, 7))
def test_pass_at_k_is_the_share_of_all_choices_of_k_samples_with_a_right_one(samples: int):
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        marks = [1] * right + [0] * (samples - right)
        choices = [any(choice) for choice in itertools.combinations(marks, k)]
        assert pass_at_k(samples, right, k) == pytest.approx(sum(choices) / len(choices))


def test_a_mean_has_the_standard_error_of_independent_problems():
    values = [0.0, 1.0, 0.5, 1.0]
    found = estimate(values)
    assert found.value == statistics.mean(values)
    assert found.error == pytest.approx(statistics.stdev(values) / 2)
    assert estimate([1.0]).value == 1
    assert math.isnan(estimate([1.0]).error)
    assert math.isnan(estimate([]).value)
    both = mean_of([Estimate(0.2, 0.03), Estimate(0.4, 0.04)])
    assert both == pytest.approx(Estimate(0.3, 0.025))


def test_failures_are_counted_and_take_no_part():
    rows = [
        [attempt(1.0), attempt(0.0), attempt(1.0, "ValueError: x")],
        [attempt(0.0), attempt(0.0), attempt(0.0, ended=False)],
        [attempt(0.0, "took longer than 1 s")] * 3,
        [attempt(1.0), attempt(1.0), attempt(1.0)],
    ]
    found = figures(rows, 3)
    assert found["accuracy"].value == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert found["pass@1"] == found["accuracy"]
    assert found["pass@2"].value == pytest.approx((1 + 0 + 1) / 3)
    assert found["pass@3"].value == pytest.approx((0 + 1) / 2)
    assert [found[key] for key in ("problems", "samples", "failures", "cut")] == [4, 12, 4, 1]
    assert found["failure"] == {"took longer than 1 s": 3, "ValueError: x": 1}


def test_the_table_has_a_line_for_each_environment_the_mean_and_each_failure():
    one = figures([[attempt(1.0)], [attempt(0.0)]], 1)
    other = figures([[attempt(1.0)], [attempt(1.0, "KeyError: 'a'")]], 1)
    for found in (one, other):
        found |= {"most_frequent_answer": "2" * 40, "most_frequent": Estimate(0.25, 0.05)}
    lines = table({"one": one, "other": other})
    assert [line.split()[0] for line in lines] == ["environment", "one", "other", "mean", "note:"]
    assert "50.0% ± 50.0%" in lines[1]
    assert "25.0% ± 5.0%" in lines[1]
    assert lines[4] == "note: other: 1 not judged: KeyError: 'a'"
    assert len(table({"one": one})) == 2


def test_details_hold_what_was_said_and_why():
    (row,) = details("one", [[attempt(1.0)]])
    assert (row["environment"], row["answer"], row["reward"], row["reason"]) == ("one", "2", 1.0, "why")
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
