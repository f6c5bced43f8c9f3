"""Whether an environment can be trusted: it pays for its own answers, and for nothing that only looks like them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from datamodules.environments.pool import Pool
from modules.batch import Judgement, Problem

JUNK = "{} xyzzy", "it is {} or 17"
"""What is put around an answer."""


@dataclass(frozen=True)
class SelfTest:
    """What a self-test found."""

    problems: list[Problem]
    """The problems that were tried."""
    faults: list[str]
    """What is wrong, a line each; none: it passed."""
    notes: list[str]
    """What may be wrong."""


def self_test(pool: Pool, name: str, number: int = 20, seed: int = 0) -> SelfTest:
    """Try an environment with replies of which is known what they are worth.

    Of each problem, the answer must be paid 1, and so must the environment's own solution if it has any; an empty
    reply, near misses (a digit or a letter changed) and the answer with junk around it must be paid 0. Near misses that
    are paid in no more than half of the problems are a note: where several answers are right, one may be hit.

    Args:
        pool: has the environment.
        name: its name there.
        number: problems to try.
        seed: of the problems; both sides, trained and held out, are tried.

    Raises:
        UserError: its problems cannot be drawn.
    """
    half = -(-number // 2)
    problems = [p for held_out in (False, True) for p in _some(pool, name, seed, half, held_out)][:number]
    tried = [(p, kind, reply) for p in problems for kind, reply in _replies(p)]
    solutions = pool.solutions(name, problems) or []
    tried += [(p, "solution", str(turn["content"])) for p, turn in zip(problems, solutions, strict=bool(solutions))]
    found = pool.judge(name, [(problem, reply) for problem, _, reply in tried])
    faults: dict[str, list[str]] = {}
    for (problem, kind, reply), judgement in zip(tried, found, strict=True):
        if (fault := _fault(problem, kind, reply, judgement)) is not None:
            faults.setdefault(kind, []).append(fault)
    hits = faults.get("near miss", [])
    notes = [f"near miss: {hits[0]} ({len(hits)} times)"] if hits and 2 * len(hits) <= len(problems) else []
    if notes:
        del faults["near miss"]
    again = _some(pool, name, seed, half, held_out=False)
    if [p.text for p in again] != [p.text for p in problems[: len(again)]]:
        faults["draws"] = ["the same seed and number give another problem"]
    return SelfTest(problems, [f"{kind}: {lines[0]} ({len(lines)} times)" for kind, lines in faults.items()], notes)


def _some(pool: Pool, name: str, seed: int, number: int, held_out: bool) -> list[Problem]:
    most = pool.available(name, held_out)
    return pool.problems(name, seed, range(number if most is None else min(number, most)), held_out)


def _replies(problem: Problem) -> Iterator[tuple[str, str]]:
    """Yield (kind, reply)."""
    answer = problem.answer
    yield "answer", answer
    yield "empty", ""
    yield from (("junk", form.format(answer)) for form in JUNK)
    yield "near miss", near_miss(answer)


def near_miss(answer: str) -> str:
    """Return an answer with its first digit, else its first letter, changed; one without either gets a letter more."""
    found = re.search(r"[1-9]", answer) or re.search(r"\d", answer) or re.search(r"[^\W\d_]", answer)
    if found is None:
        return answer + "x"
    mark = found[0]
    other = (
        str(int(mark) % 9 + 1) if mark.isdecimal() else {"x": "y", "X": "Y"}.get(mark, "X" if mark.isupper() else "x")
    )
    return answer[: found.start()] + other + answer[found.end() :]


def _fault(problem: Problem, kind: str, reply: str, judgement: Judgement) -> str | None:
    due = float(kind in ("answer", "solution"))
    shown = f"{reply[:60]!r} where {problem.answer[:60]!r} is right"
    if judgement.failure is not None:
        return f"{shown}: {judgement.failure}"
    return None if judgement.reward == due else f"{shown} is paid {judgement.reward:g} ({judgement.reason})"
