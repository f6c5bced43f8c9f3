"""Problems from a file: a prompt and a reference a line, judged by a named checker."""

import json
from functools import cached_property
from pathlib import Path

from datamodules.conversations.messages import ConversationError, read_messages
from datamodules.environments.answers import CHECKERS, final_answer
from modules.batch import Judgement, Problem
from modules.errors import UserError


class Jsonl:
    """Problems from a JSONL file.

    Args:
        path: file of rows `{"prompt": TEXT, "reference": TEXT}`; a row may have `messages` in place of `prompt`.
        checker: how the final answer is compared with the reference: exact (to the letter, blanks apart), words
            (whatever the case and the marks), number (equal in value), math (equal by math-verify).
        held_out_share: share of the problems that is never trained on: 1 for a test set, 0 for training data only.

    Raises:
        UserError: a value is out of range.
    """

    def __init__(self, path: str, checker: str = "exact", held_out_share: float = 0.2) -> None:
        if checker not in CHECKERS:
            raise UserError(f"checker: {checker} is none of {', '.join(CHECKERS)}")
        if not 0 <= held_out_share <= 1:
            raise UserError(f"held_out_share: {held_out_share} must be between 0 and 1")
        self.path, self.held_out_share = Path(path), held_out_share
        self._check = CHECKERS[checker]

    @cached_property
    def problems(self) -> list[Problem]:
        """All problems.

        Raises:
            UserError: the file or a line is wrong; names it.
        """
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"path: {self.path} cannot be read ({error})") from None
        found = [_read(line, f"{self.path}:{place}") for place, line in enumerate(lines, 1) if line.strip()]
        if not found:
            raise UserError(f"path: {self.path} holds no problem")
        return found

    def problem(self, seed: int, number: int) -> Problem:
        """Return a problem of the file, one after the other; `draw` mixes them by seed and knows the held-out ones.

        Raises:
            UserError: its reference is not what the checker looks for, so that nothing could be right.
        """
        problem = self.problems[(seed + number) % len(self.problems)]
        if not self._check(problem.answer.strip(), problem.answer):
            name = self._check.__name__
            raise UserError(
                f"path: {self.path} has the reference {problem.answer!r:.80}, to which {name} calls nothing equal"
            )
        return problem

    def judge(self, problem: Problem, reply: str) -> Judgement:
        """Compare the final answer with the reference."""
        answer = final_answer(reply)
        right = answer != "" and self._check(answer, problem.answer)
        return Judgement(reward=float(right), reason="right" if right else f"{answer[:80]!r} is not the reference")


def _read(line: str, place: str) -> Problem:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{place}: no JSON ({error})") from None
    row = row if isinstance(row, dict) else {}
    prompt, messages, reference = row.get("prompt"), row.get("messages"), row.get("reference")
    if isinstance(reference, int | float) and not isinstance(reference, bool):
        reference = str(reference)
    if not isinstance(reference, str) or not reference.strip():
        raise UserError(f"{place}: needs `reference`, a text that is not empty")
    if isinstance(prompt, str) and messages is None:
        messages = [{"role": "user", "content": prompt}]
    if not messages or not isinstance(messages, list):
        raise UserError(f"{place}: needs either `prompt`, a text, or `messages`, turns with role and content")
    try:
        return Problem(messages=read_messages(messages), answer=reference)
    except ConversationError as error:
        raise error.at(place) from None
