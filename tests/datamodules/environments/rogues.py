"""Environments that do what checkers of others do at times."""

import os
import re
import sys
import time

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
