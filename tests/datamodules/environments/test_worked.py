"""Worked answers: right by reasoning-gym's own scorers, steps that a program can follow, and known texts."""

import re
from typing import Any

import pytest
from reasoning_gym import create_dataset

from datamodules.environments.worked import MARK, STEPS, worked_answer

PROBLEMS = 300
PARAMETERS: list[tuple[str, dict[str, Any]]] = [
    ("chain_sum", {}),
    ("chain_sum", {"max_terms": 2, "max_digits": 2}),
    ("chain_sum", {"allow_negation": True}),
    ("leg_counting", {}),
    ("leg_counting", {"min_animals": 1, "max_animals": 3, "max_instances": 9}),
    ("number_filtering", {}),
    ("number_filtering", {"min_numbers": 1, "max_numbers": 3, "max_decimals": 0}),
    ("spell_backward", {}),
]


def problems(family: str, parameters: dict[str, Any]) -> Any:
    return create_dataset(family, seed=5, size=PROBLEMS, **parameters)


def test_every_form_is_tested() -> None:
    assert {family for family, _ in PARAMETERS} == set(STEPS)


@pytest.mark.parametrize(("family", "parameters"), PARAMETERS)
def test_worked_answers_are_right(family: str, parameters: dict[str, Any]) -> None:
    rows = problems(family, parameters)
    for entry in rows:
        steps, _, result = worked_answer(family, entry["question"], entry["answer"]).rpartition("\n" + MARK)
        assert steps
        assert rows.score_answer(result.strip(), entry) == 1


def test_a_family_without_a_form_says_its_result() -> None:
    assert worked_answer("gcd", "Find the Greatest Common Divisor (GCD) of these numbers: 4, 6.", "2") == "Answer: 2"


@pytest.mark.parametrize(("family", "parameters"), [entry for entry in PARAMETERS if entry[0] == "chain_sum"])
def test_columns_are_true_and_hold_the_digits_of_the_sum(family: str, parameters: dict[str, Any]) -> None:
    for entry in problems(family, parameters):
        steps = worked_answer(family, entry["question"], entry["answer"]).splitlines()[:-1]
        for line in steps:
            equations = re.findall(r"(\S+)=(\d+)", line)
            assert all(eval(left) == int(right) for left, right in equations)
        results = [result for _, result in equations]
        digits = results[-1] + "".join(result[-1] for result in reversed(results[:-1]))
        assert int(digits) == abs(int(entry["answer"]))


@pytest.mark.parametrize(
    ("family", "question", "answer", "worked"),
    [
        (
            "chain_sum",
            "State the final answer to the following arithmetic problem: 47 + 85 - 9 =",
            "123",
            "7+5=12 4+8+1=13\n132-9 12-9=3 3-0-1=2 1-0-0=1\nAnswer: 123",
        ),
        (
            "chain_sum",
            "State the final answer to the following arithmetic problem: 7 - 43 =",
            "-36",
            "43-7 13-7=6 4-0-1=3\nAnswer: -36",
        ),
        (
            "leg_counting",
            "How many legs are there in total if you have 8 butterflys, 4 crabs, 1 praying mantis?\n",
            "94",
            "8 butterflys 8*6=48\n4 crabs 4*10=40\n48+40 8+0=8 4+4+0=8\n"
            "1 praying mantis 1*6=6\n88+6 8+6=14 8+0+1=9\nAnswer: 94",
        ),
        (
            "number_filtering",
            "Keep all numbers larger than 17 in this list: ['52', '-92']\nReturn the new list in the same format.",
            "['52']",
            "keep >\n52 > 17 yes\n-92 < 17 no\nAnswer: ['52']",
        ),
        (
            "spell_backward",
            "Spell this word backward (example: sun -> nus): neon",
            "noen",
            "1n2e3o4n\n4n3o2e1n\nAnswer: noen",
        ),
    ],
)
def test_the_form_of_an_answer(family: str, question: str, answer: str, worked: str) -> None:
    assert worked_answer(family, question, answer) == worked
