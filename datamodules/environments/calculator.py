"""An example of an environment with a tool: sums that are worked out by calling a calculator.

It shows all that an environment may do: give tools, answer their calls (`respond`), judge the end, and solve its own
problems. A tool call is what the model's chat template writes for it, so its text is read here as Nemotron's template
writes it.
"""

import random
import re
from collections.abc import Sequence
from typing import Any

from datamodules.environments.answers import final_answer, number
from modules.batch import Judgement, Message, Problem
from modules.errors import UserError

CALL = re.compile(
    r"<tool_call>\s*<function=add>\s*<parameter=a>\s*(-?\d+)\s*</parameter>\s*<parameter=b>\s*(-?\d+)\s*</parameter>"
)
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
        """Return the result of a call, nothing where there is none."""
        call = CALL.search(str(messages[-1]["content"]).rpartition("</think>")[2])
        return [] if call is None else [{"role": "tool", "content": str(int(call[1]) + int(call[2]))}]

    def judge(self, problem: Problem, reply: str) -> Judgement:
        """Judge the last turn."""
        answer = final_answer(reply)
        right = number(answer, problem.answer)
        return Judgement(reward=float(right), reason="right" if right else f"{answer[:80]!r} is wrong")

    def solution(self, problem: Problem) -> Message:
        """Return the last turn."""
        return {"role": "assistant", "content": problem.answer}
