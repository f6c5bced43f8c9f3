"""Environments that do what checkers of others do at times."""

import dataclasses
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, ClassVar

from modules.batch import Judgement, Message, Problem


class Rogue:
    """Does as the reply says; the answer is `right`."""

    def __init__(self, texts: int = 10**9) -> None:
        self.texts = texts

    def problem(self, seed: int, number: int) -> Problem:
        place = (1000 * seed + number) % self.texts
        return Problem(messages=[{"role": "user", "content": f"question {place}"}], answer="right")

    def judge(self, problem: Problem, reply: str) -> Judgement:
        if reply == "raise":
            raise KeyError("no such thing")
        if reply == "sleep":
            time.sleep(60)
        if reply == "backtrack":
            re.match(r"(a+)+b", "a" * 40)  # holds the interpreter's lock for hours
        if reply == "eat":
            bytearray(2**36)
        if reply == "exit":
            sys.exit(3)
        if reply == "die":
            os._exit(7)
        if reply == "print":
            print("noise")
        return Judgement(reward=float(reply == "right"), reason="compared")


class Formless(Rogue):
    """Says what no trainer can use, as the reply wishes, in judgements and in turns."""

    SAID: ClassVar[dict[str, Any]] = {"none": None, "text": "1", "pair": (1.0, "right"), "dict": {}, "list": [5]}

    def judge(self, problem: Problem, reply: str) -> Any:
        if reply in ("nan", "inf", "high"):
            reward: Any = "high" if reply == "high" else float(reply)
            return Judgement(reward=reward, reason="made up")
        return self.SAID[reply]

    def respond(self, problem: Problem, messages: Sequence[Message]) -> Any:
        said = messages[-1]["content"]
        if said == "raise":
            raise KeyError("no such thing")
        if said == "sleep":
            time.sleep(60)
        if said == "mute":
            return [{"role": "tool"}]
        return self.SAID[said]


class Unanswered(Rogue):
    """Has an answer that is no text."""

    def problem(self, seed: int, number: int) -> Problem:
        return dataclasses.replace(super().problem(seed, number), answer=5)  # type: ignore[arg-type]


class Generous(Rogue):
    """Pays for whatever holds the answer."""

    def judge(self, problem: Problem, reply: str) -> Judgement:
        return Judgement(reward=float("right" in reply), reason="looked for")


class Blind(Rogue):
    """Pays for a word of the right length."""

    def judge(self, problem: Problem, reply: str) -> Judgement:
        return Judgement(reward=float(len(reply) == 5), reason="counted")


class Boastful(Rogue):
    """Answers its own problems wrongly."""

    def solution(self, problem: Problem) -> Message:
        return {"role": "assistant", "content": "left"}


class Fickle(Rogue):
    """Has another problem each time."""

    def problem(self, seed: int, number: int) -> Problem:
        return super().problem(seed, number + time.monotonic_ns())
