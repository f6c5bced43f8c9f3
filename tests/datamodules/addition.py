"""An environment that is imported at once."""

from modules.batch import Message, Problem


class Addition:
    """Sums of numbers below 100; knows its answers."""

    def problem(self, seed: int, number: int) -> Problem:
        first, second = (seed * 7919 + number * 104729) % 100, number % 100
        asked = [{"role": "user", "content": f"{first} + {second} ="}]
        return Problem(messages=asked, answer=str(first + second))

    def solution(self, problem: Problem) -> Message:
        return {"role": "assistant", "content": problem.answer}
