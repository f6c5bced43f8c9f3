"""The self-test finds environments that pay for the wrong thing."""

import pytest

from datamodules.environments.pool import Pool
from datamodules.environments.self_test import near_miss, self_test
from tests.datamodules.environments.helpers import rogue

CALCULATOR = {"class_path": "datamodules.environments.calculator.Calculator"}


@pytest.mark.parametrize(
    ("definition", "kinds"),
    [
        (rogue(), []),
        (CALCULATOR, []),
        (rogue("Generous"), ["junk"]),
        (rogue("Boastful"), ["solution"]),
        (rogue("Blind"), ["near miss"]),
        (rogue("Fickle"), ["draws"]),
    ],
    ids=["rogue", "calculator", "generous", "boastful", "blind", "fickle"],
)
def test_faults_are_found_and_named(definition: dict, kinds: list[str]):
    with Pool({"it": definition}) as pool:
        found = self_test(pool, "it", 6)
    assert [fault.partition(":")[0] for fault in found.faults] == kinds
    assert found.notes == []
    assert len({problem.text for problem in found.problems}) == len(found.problems)


@pytest.mark.parametrize(("answer", "other"), [("105", "205"), ("0", "1"), ("word", "xord"), ("x", "y"), ("+", "+x")])
def test_a_near_miss_is_another_answer(answer: str, other: str):
    assert near_miss(answer) == other
