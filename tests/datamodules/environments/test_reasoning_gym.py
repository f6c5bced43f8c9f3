"""The adapter of reasoning-gym pays for what is exactly right, in every family, and makes the same problem again."""

import random
from itertools import pairwise

import pytest
from reasoning_gym import create_dataset

from datamodules.environments.pool import Pool
from datamodules.environments.reasoning_gym import MADE_ONCE, NO_ANSWER, ReasoningGym, _index, families
from datamodules.environments.self_test import self_test
from modules.errors import UserError
from tests.datamodules.environments.helpers import family

NEEDS_PARAMETERS = ("composite",)
PARTS = 8
"""Of the families, so that each test ends soon."""


def test_there_are_106_families():
    assert len(families()) == 106


@pytest.mark.parametrize("part", range(PARTS))
def test_every_family_passes_the_self_test(part: int):
    names = [name for name in families()[part::PARTS] if name not in (*NO_ANSWER, *NEEDS_PARAMETERS)]
    with Pool({name: family(name) for name in names}, processes=2) as pool:
        faults = {name: self_test(pool, name, 2).faults for name in names}
    assert not {name: found for name, found in faults.items() if found}


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("chain_sum", "{}", "{}0"),  # upstream: a half
        ("chain_sum", "{}.0", "1{}"),
        ("letter_counting", " {}\n", "The answer is {}"),  # upstream: a part
        ("spell_backward", "{}", "{}xxxx"),  # upstream: 1.0000000000000002
        ("game_of_life_halting", "{}", "xyzzy"),  # upstream: 1 where False is right
        ("complex_arithmetic", "{}", "nan"),  # upstream: 1
        ("coin_flip", "{}", "{}1"),  # upstream: 1 within 1e-4
        ("gsm_symbolic", "{}", "It is {} or 17"),  # upstream: 1
        ("prime_factorization", "{}", "seven"),  # upstream: raises
        ("game_of_life", "{}", "{{}}"),  # upstream: raises
    ],
)
def test_upstreams_payments_for_wrong_answers_are_withheld(name: str, right: str, wrong: str):
    environment = ReasoningGym(name)
    for number in range(8):
        problem = environment.problem(0, number)
        for reply, reward in ((right, 1), (f"steps\nAnswer: {right}", 1), (wrong, 0)):
            assert environment.judge(problem, reply.format(problem.answer)).reward == reward


def test_numbers_that_are_off_are_not_sorted():
    environment = ReasoningGym("number_sorting")
    problem = environment.problem(0, 1)
    numbers = eval(problem.answer)
    other = [*numbers[:-1], str(float(numbers[-1]) - 1)]
    assert environment.judge(problem, str(numbers).replace("'", '"')).reward == 1
    assert environment.judge(problem, str(other)).reward == 0


def test_a_solution_of_other_numbers_is_none():
    environment = ReasoningGym("puzzle24")
    problems = [environment.problem(0, number) for number in range(6)]
    for problem, other in pairwise(problems):
        assert environment.judge(problem, problem.answer).reward == 1
        assert environment.judge(problem, other.answer).reward == 0


@pytest.mark.parametrize("name", ["codeio", "list_functions", "pool_matrix", "word_ladder", "gsm_symbolic"])
def test_a_problem_is_the_same_again_and_leaves_random_numbers_alone(name: str):
    random.seed(5)
    state = random.getstate()
    once = [ReasoningGym(name).problem(7, number) for number in range(3)]
    assert random.getstate() == state
    random.seed(6)
    assert [ReasoningGym(name).problem(7, number) for number in range(3)] == once


def test_a_problem_is_the_same_in_another_process():
    names = ("isomorphic_strings", "ransom_note", "polynomial_multiplication")  # these go through sets
    definitions = {name: family(name) for name in names}
    drawn = []
    for _ in range(2):
        with Pool(definitions) as pool:
            drawn.append([pool.problems(name, 0, range(8), held_out=True) for name in names])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chainsum",), "family: reasoning-gym has no chainsum; did you mean chain_sum"),
        (("boxnet",), "family: boxnet is broken in reasoning-gym: its problems come without an answer"),
        (("chain_sum", {"seed": 1}), r"parameters\.seed: leave it out"),
        (("chain_sum", {"max_term": 1}), "parameters: chain_sum does not take {'max_term': 1}"),
        (("chain_sum", {"min_terms": 5, "max_terms": 2}), "parameters: chain_sum does not take"),
    ],
)
def test_wrong_settings_are_named(arguments: tuple, message: str):
    with pytest.raises(UserError, match=message):
        ReasoningGym(*arguments)


@pytest.mark.parametrize("name", sorted(MADE_ONCE))
def test_a_family_that_is_made_once_makes_the_problems_of_one_made_anew(name: str):
    environment = ReasoningGym(name)
    for number in range(3):
        problem = environment.problem(3, number)
        anew = create_dataset(name, seed=_index(3, number), size=1)[0]
        assert problem.text == anew["question"]
        assert environment.judge(problem, problem.answer).reward == 1


def test_steps_are_thoughts_in_every_second_solution_and_text_in_the_others():
    environment = ReasoningGym("chain_sum")
    thoughts = 0
    for number in range(200):
        problem = environment.problem(0, number)
        solution = environment.solution(problem)
        steps = solution.get("reasoning_content", "")
        thoughts += bool(steps)
        assert "=" in steps + solution["content"]
        assert solution["content"].endswith(f"Answer: {problem.answer}")
        assert solution["content"].startswith("Answer:") == bool(steps)
        assert environment.judge(problem, solution["content"]).reward == 1
        assert solution == environment.solution(problem)
    assert 70 < thoughts < 130
