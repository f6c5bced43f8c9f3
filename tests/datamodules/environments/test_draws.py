"""Held out is decided by a problem's text: no seed, near or far, mixes the sides."""

import json
from pathlib import Path

import pytest

from datamodules.environments.draws import available, draw, is_held_out, normalised, overlap
from datamodules.environments.jsonl import Jsonl
from datamodules.environments.reasoning_gym import ReasoningGym
from modules.batch import Problem
from modules.errors import UserError
from tests.datamodules.environments.rogues import Rogue

SEEDS = (0, 1, 2, 500, 10**6, 2**40)
SMALL = ReasoningGym("chain_sum", {"max_terms": 2, "max_digits": 1})


def asked(prompt: str, answer: str = "a") -> Problem:
    return Problem(messages=[{"role": "user", "content": prompt}], answer=answer)


def file_of(folder: Path, number: int = 50) -> str:
    file = folder / "problems.jsonl"
    rows = [{"prompt": f"what is {place} + 1?", "reference": place + 1} for place in range(number)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("environment", [SMALL, Rogue(texts=40)])
def test_no_seed_mixes_what_is_trained_on_and_what_is_held_out(environment):
    sides = [
        {normalised(draw(environment, seed, number, held_out).text) for seed in SEEDS for number in range(60)}
        for held_out in (False, True)
    ]
    assert sides[0].isdisjoint(sides[1])
    assert min(map(len, sides)) >= 3


def test_a_plain_seed_would_have_mixed_them():
    drawn = [{SMALL.problem(seed, number).text for number in range(200)} for seed in (0, 1)]
    assert len(drawn[0] & drawn[1]) > len(drawn[1]) / 2


def test_a_problem_follows_from_seed_and_number_alone():
    for held_out in (False, True):
        once = [draw(SMALL, 3, number, held_out) for number in range(20)]
        other = ReasoningGym("chain_sum", {"max_terms": 2, "max_digits": 1})
        again = [draw(other, 3, number, held_out) for number in reversed(range(20))]
        assert once == again[::-1]
        assert once != [draw(SMALL, 4, number, held_out) for number in range(20)]


def test_a_fifth_of_the_texts_is_held_out_whatever_blanks_and_case():
    texts = [f"What is {a} + {b}?" for a in range(50) for b in range(50)]
    share = sum(map(is_held_out, texts)) / len(texts)
    assert 0.17 < share < 0.23
    assert [is_held_out(f" {text.upper()}\n") for text in texts] == [is_held_out(text) for text in texts]


def test_a_list_is_gone_through_once_on_each_side(tmp_path: Path):
    environment = Jsonl(file_of(tmp_path), "number", held_out_share=0.3)
    counts = [available(environment, held_out) for held_out in (False, True)]
    assert sum(counts) == 50
    assert min(counts) > 5
    sides = [{draw(environment, 1, n, side).text for n in range(counts[side])} for side in (False, True)]
    assert [len(side) for side in sides] == counts
    assert sides[0].isdisjoint(sides[1])
    other = [draw(environment, 2, n, True).text for n in range(counts[1])]
    assert set(other) == sides[1]
    assert other != [draw(environment, 1, n, True).text for n in range(counts[1])]


@pytest.mark.parametrize(("share", "held_out"), [(1.0, False), (0.0, True)])
def test_a_test_set_has_nothing_to_train_on_and_training_data_nothing_held_out(tmp_path, share: float, held_out: bool):
    environment = Jsonl(file_of(tmp_path), held_out_share=share)
    assert available(environment, not held_out) == 50
    with pytest.raises(UserError, match="held_out_share"):
        draw(environment, 0, 0, held_out)


def test_too_few_different_problems_are_told():
    one = Rogue(texts=1)
    side = is_held_out(one.problem(0, 0).text)
    assert draw(one, 0, 9, side).text == "question 0"
    with pytest.raises(UserError, match="too few different"):
        draw(one, 0, 0, not side)


def test_overlap_counts_problems_that_a_row_asks():
    problems = [asked("What is 1 + 1?"), asked("Spell sun."), asked("Not there"), asked("be short\nsay hi")]
    rows = [
        [{"role": "user", "content": "what is  1 + 1?\n"}, {"role": "assistant", "content": "Not there"}],
        [{"role": "user", "content": "hello"}, {"role": "assistant"}, {"role": "user", "content": "Spell sun."}],
        [{"role": "system", "content": "Be short"}, {"role": "user", "content": "say hi"}],
        [{"role": "user", "content": "What is 1 + 1? Not there"}],
    ]
    assert overlap(rows, problems) == 3
    assert overlap(rows[3:], problems) == 0
