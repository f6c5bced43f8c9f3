"""An example of an environment with a tool: sums that are worked out by calling a calculator.

It shows all that an environment may do: give tools, answer their calls, judge the end, and solve its own problems.
"""

import random
from collections.abc import Sequence
from typing import Any

from datamodules.environments.answers import final_answer, number
from modules.batch import Judgement, Message, Problem
from modules.errors import UserError

ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two integers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


class Calculator:
    """Sums of two numbers and a tool that adds.

    Args:
        digits: digits of a number at most, >= 1.

    Raises:
        UserError: digits is out of range.
    """

    def __init__(self, digits: int = 4) -> None:
        if digits < 1:
            raise UserError(f"digits: {digits} must be at least 1")
        self.digits = digits

    def problem(self, seed: int, number: int) -> Problem:
        """Return a sum."""
        draws = random.Random(f"{seed}/{number}")
        a, b = draws.randrange(10**self.digits), draws.randrange(10**self.digits)
        return Problem(
            messages=[{"role": "user", "content": f"What is {a} + {b}? Use the tool, then give the number alone."}],
            answer=str(a + b),
            tools=[ADD],
        )

    def respond(self, problem: Problem, messages: Sequence[Message]) -> list[Message]:
        """Return the result of each call, nothing where there is none."""
        calls = [call["function"] for call in messages[-1].get("tool_calls", [])]
        return [{"role": "tool", "content": _add(call["name"], call["arguments"])} for call in calls]

    def judge(self, problem: Problem, reply: str) -> Judgement:
        """Judge the last turn."""
        answer = final_answer(reply)
        right = number(answer, problem.answer)
        return Judgement(reward=float(right), reason="right" if right else f"{answer[:80]!r} is wrong")

    def solution(self, problem: Problem) -> Message:
        """Return the last turn."""
        return {"role": "assistant", "content": problem.answer}


def _add(name: str, arguments: dict[str, Any]) -> str:
    values = [arguments.get(key) for key in ("a", "b")]
    if name != "add" or not all(isinstance(value, int) for value in values):
        return "error: call add with two integers a and b"
    return str(sum(values))
