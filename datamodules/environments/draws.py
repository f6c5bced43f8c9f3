"""Which problems are trained on and which are held out: decided by what a problem asks, never by its seed.

A generator of small problems repeats itself: two seeds share most of their texts. So a problem is held out if a hash of
its text says so, a fixed share of all. What training draws and what evaluation draws can then never meet, whatever the
seeds, the parameters or the number of problems, and nobody has to keep a list.
"""

import hashlib
import random
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Protocol, runtime_checkable

from modules.batch import Environment, Message, Problem
from modules.errors import UserError

HELD_OUT_SHARE = 0.2
"""Share of the different texts that is held out: families with few texts keep enough on both sides."""
TRIES = 256
"""Problems looked at for one of the side that is asked for: 0.8 ** 256 is 1e-25."""


@runtime_checkable
class Listed(Protocol):
    """An environment with a list of problems, not endless ones."""

    held_out_share: float
    """Share of the texts that is held out: 1 for a test set, 0 for what is trained on only."""

    @property
    def problems(self) -> Sequence[Problem]:
        """All problems."""
        ...


def normalised(text: str) -> str:
    """Return a text with single blanks and without case: two problems that differ in no more are the same."""
    return " ".join(text.casefold().split())


def is_held_out(text: str, share: float = HELD_OUT_SHARE) -> bool:
    """Return whether a problem with this text is held out: a `share` of all texts is, the same ones everywhere."""
    digest = hashlib.sha256(normalised(text).encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def draw(environment: Environment, seed: int, number: int, held_out: bool) -> Problem:
    """Return the problem of a number on one side, the same everywhere; a list is gone through in an order by seed.

    Args:
        environment: where from.
        seed: any; one seed's problems are as good as another's.
        number: >= 0.
        held_out: whether it is for evaluation; no such problem is ever drawn for training.

    Raises:
        UserError: there is none on that side; says what to change.
    """
    if isinstance(environment, Listed):
        side = _side(environment, seed, held_out)
        if not side:
            kind = "held out" if held_out else "left to train on"
            raise UserError(
                f"none of {len(environment.problems)} problems is {kind} (held_out_share is "
                f"{environment.held_out_share}); a test set has held_out_share: 1, and training data 0"
            )
        return side[number % len(side)]
    for attempt in range(TRIES):
        problem = environment.problem(seed, number * TRIES + attempt)
        if is_held_out(problem.text) == held_out:
            return problem
    kind = "held out" if held_out else "left to train on"
    raise UserError(
        f"none of {TRIES} problems is {kind}: there are too few different ones; give parameters with more of them"
    )


def available(environment: Environment, held_out: bool) -> int | None:
    """Return how many problems one side of a list has; None: without end."""
    return len(_side(environment, 0, held_out)) if isinstance(environment, Listed) else None


def overlap(rows: Iterable[Sequence[Message]], problems: Iterable[Problem]) -> int:
    """Count the problems whose text is in a training row: as one of its turns, or as all that are not the assistant's.

    Args:
        rows: the conversations that are trained on.
        problems: held-out ones.
    """
    asked = {normalised(problem.text) for problem in problems}
    found: set[str] = set()
    for messages in rows:
        found |= asked & asked_in(messages)
    return len(found)


def asked_in(messages: Sequence[Message]) -> set[str]:
    """Return what a conversation asks, normalised: each turn that is not the assistant's, and all of them together."""
    turns = [str(message.get("content") or "") for message in messages if message["role"] != "assistant"]
    return set(map(normalised, [*turns, "\n".join(turns)]))


@lru_cache(maxsize=16)
def _side(environment: Listed, seed: int, held_out: bool) -> list[Problem]:
    """Return the different problems of one side in an order by seed."""
    different = {normalised(problem.text): problem for problem in environment.problems}
    side = [p for p in different.values() if is_held_out(p.text, environment.held_out_share) == held_out]
    return random.Random(seed).sample(side, len(side))
