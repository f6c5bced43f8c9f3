"""The families of reasoning-gym as environments.

What is kept from it: problems, reference answers, and its scorers, which alone know all right answers where there are
several. What is not: that they pay for wrong ones. Their part credit is no credit here (paid is a score of exactly 1),
an answer with something beside it is not the answer, and what is known of single families stands in the tables below;
`python -m app environments 'reasoning_gym/*'` tries them all.

A problem is made from its (seed, number) alone, by a data set of one row: a family's rows i and i + 1 of seeds s and
s - 1 are the same. A judgement makes it again, so that what a scorer needs to know need not be JSON.
"""

import copy
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from difflib import get_close_matches
from functools import cached_property, lru_cache
from typing import Any

from datamodules.environments.answers import final_answer
from datamodules.environments.worked import MARK, worked_answer
from modules.batch import Judgement, Message, Problem
from modules.errors import UserError

NO_ANSWER = ("boxnet", "rush_hour")
"""Families whose problems come without a reference answer (reasoning-gym 0.1.25): nothing can be checked with them."""
ANSWERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "graph_color": lambda metadata: json.dumps(metadata["possible_answer"]),
    "propositional_logic": lambda metadata: metadata["example_answer"],
    "rubiks_cube": lambda metadata: metadata["example_correct_answer"],
}
"""Family -> where its reference answer is, if not in its place."""
ONE_ANSWER = frozenset(
    {
        "coin_flip",  # pays for 0 in place of small probabilities
        "complex_arithmetic",  # pays for nan
        "game_of_life_halting",  # pays for any text where False is right
        "gsm_symbolic",  # takes the last number of a sentence, and refuses negative ones
        "number_sorting",  # pays for numbers that are off by 1 or more
        "pool_matrix",  # pays for numbers that are off
    }
)
"""Families with one right answer whose scorers pay for others too: they are compared with the reference."""
MADE_ONCE = frozenset(
    {
        *("arc_agi", "caesar_cipher", "codeio", "emoji_mystery", "figlet_font", "group_anagrams", "letter_counting"),
        *("letter_jumble", "sentence_reordering", "spell_backward", "word_ladder", "word_sequence_reversal"),
        "word_sorting",
    }
)
"""Families that read files when they are made (2 to 350 ms), and take nothing from their seed before a row is asked
for: they are made once, not for each problem."""
FORMS = {
    "game_of_life": re.compile(r"\[.*\]", re.DOTALL),
    "prime_factorization": re.compile(r"\d+(\s*\u00d7\s*\d+)*"),
}
"""Family -> what an answer looks like; its scorer raises at anything else, which is a wrong answer and no failure."""


def _numbers_of_the_reference(answer: str, reference: str) -> bool:
    return sorted(re.findall(r"\d+", answer)) == sorted(re.findall(r"\d+", reference))


CONDITIONS: dict[str, Callable[[str, str], bool]] = {"puzzle24": _numbers_of_the_reference}
"""Family -> what its scorer forgets to ask of an answer, given the reference."""


class ReasoningGym:
    """A family of reasoning-gym. The package (a second to import) is loaded with the first problem.

    Args:
        family: name of the family, for example chain_sum.
        parameters: its parameters, but for seed and size; null: its defaults.

    Raises:
        UserError: there is no such family or parameter, or nothing can be checked with it.
    """

    def __init__(self, family: str, parameters: dict[str, Any] | None = None) -> None:
        self.family, self.parameters = family, dict(parameters or {})
        if family in NO_ANSWER:
            raise UserError(f"family: {family} is broken in reasoning-gym: its problems come without an answer")
        for key in {"seed", "size"} & self.parameters.keys():
            raise UserError(f"parameters.{key}: leave it out; problems are drawn by seed and number")
        if family not in families():
            near = get_close_matches(family, families(), n=3)
            raise UserError(
                f"family: reasoning-gym has no {family}" + (f"; did you mean {', '.join(near)}?" if near else "")
            )
        try:
            self._entry(0)
        except (TypeError, AssertionError, ValueError) as error:
            raise UserError(f"parameters: {family} does not take {self.parameters} ({error})") from error
        self._entry = lru_cache(maxsize=8)(self._entry)  # a data set may hold a word list

    def problem(self, seed: int, number: int) -> Problem:
        """Return the problem of a number; its facts say how to make it again."""
        _, entry, answer = self._entry(_index(seed, number))
        return Problem(
            messages=[{"role": "user", "content": entry["question"]}],
            answer=answer,
            facts={"seed": seed, "number": number},
        )

    def judge(self, problem: Problem, reply: str) -> Judgement:
        """Judge the final answer of a reply: 1 where it is exactly right, else 0."""
        scorer, entry, reference = self._made_again(problem)
        answer = final_answer(reply)
        reason = self._refusal(answer, reference)
        if reason is None and self.family not in ONE_ANSWER:
            score = scorer.score_answer(answer, copy.deepcopy(entry))
            reason = None if score == 1 else f"{answer[:80]!r} scores {score:.3g}"
        return Judgement(reward=float(reason is None), reason=reason or "right")

    def solution(self, problem: Problem) -> Message:
        """Return a worked answer; in every second one the steps are thoughts.

        So a model learns to take its steps whether it is asked to think or not.
        """
        _, entry, gold = self._made_again(problem)
        answer = worked_answer(self.family, entry["question"], gold)
        steps, _, result = answer.partition(MARK)
        if not steps or hashlib.sha256(problem.text.encode()).digest()[-1] % 2:
            return {"role": "assistant", "content": answer}
        return {"role": "assistant", "reasoning_content": steps.rstrip("\n"), "content": MARK + result}

    def _refusal(self, answer: str, reference: str) -> str | None:
        """Return why an answer is wrong whatever the scorer says, None if that cannot be told."""
        if not answer:
            return "no answer"
        if answer == reference:
            return None
        shown = repr(answer[:80])
        if self.family in ONE_ANSWER:
            return None if _bare(answer) == _bare(reference) else f"{shown} is wrong"
        if reference in answer and not _equal(answer, reference):
            return f"{shown} is more than the answer"
        if self.family in FORMS and not FORMS[self.family].fullmatch(answer):
            return f"{shown} has not the form of an answer"
        if self.family in CONDITIONS and not CONDITIONS[self.family](answer, reference):
            return f"{shown} leaves the conditions of the problem"
        return None

    def _made_again(self, problem: Problem) -> tuple[Any, dict[str, Any], str]:
        found = self._entry(_index(problem.facts["seed"], problem.facts["number"]))
        assert found[1]["question"] == problem.text, f"{self.family} made another problem of the same seed"
        return found

    @cached_property
    def _made_once(self) -> Any:
        from reasoning_gym.factory import create_dataset

        return create_dataset(self.family, seed=0, size=1, **self.parameters)

    def _entry(self, index: int) -> tuple[Any, dict[str, Any], str]:
        """Return the scorer, the row of reasoning-gym and the reference answer of a problem."""
        from reasoning_gym.factory import create_dataset

        with _seeded(index):
            if self.family in MADE_ONCE:
                rows = copy.copy(self._made_once)
                rows.seed = index
            else:
                rows = create_dataset(self.family, seed=index, size=1, **self.parameters)
            entry = rows[0]
        answer = ANSWERS[self.family](entry["metadata"]) if self.family in ANSWERS else entry["answer"]
        return rows, entry, str(answer).strip()


@lru_cache(maxsize=1)
def families() -> list[str]:
    """Return the names of all families."""
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS)


def _index(seed: int, number: int) -> int:
    """Return the seed (32 bits, all that some families take) of a problem."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4], "big")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed Python's and numpy's own generators for a while: some families draw from these."""
    import numpy as np

    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _bare(text: str) -> str:
    """Return a text without what no answer depends on: quotes, case, further blanks, zeros behind a decimal point."""
    plain = " ".join(re.sub(r"['\"]", "", text).casefold().split())
    tight = re.sub(r"\s*([,\[\]])\s*", r"\1", plain)
    return re.sub(r"\d+\.\d+", lambda found: found[0].rstrip("0").rstrip("."), tight)


def _equal(answer: str, reference: str) -> bool:
    """Return whether both are the same number: 7.0 is 7."""
    try:
        return Decimal(answer) == Decimal(reference)
    except InvalidOperation:
        return False
