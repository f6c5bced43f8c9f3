"""A reply told apart into thoughts, content and calls while it is being written.

It says what `read_reply` says of the whole text, as far as that can be known early: thoughts end at the first
`</think>` here, and calls come once the reply is complete, because calls that anything follows are text.
"""

from collections.abc import Sequence
from typing import Any

from datamodules.conversations.replies import END_THINK, THINK, read_reply

CALL = "<tool_call>"


class ReplyStream:
    """Turns the text of a reply into deltas of a message.

    Args:
        thinking: whether the generation prompt has opened a thought.
        tools: those that the model may call; without any, calls stay text.
    """

    def __init__(self, thinking: bool, tools: Sequence[dict[str, Any]]) -> None:
        self._thinking, self._tools = thinking, tools
        self._text = ""
        self._thoughts = self._content = 0  # characters sent

    def add(self, piece: str) -> dict[str, str]:
        """Take text; return what is certain now: `reasoning_content`, `content`, or nothing."""
        self._text += piece
        thoughts, said = self._divide(complete=False)
        if said is None:
            thoughts = thoughts[: len(thoughts) - _uncertain(thoughts, END_THINK)].rstrip("\n")
        elif self._tools:
            said = said.partition(CALL)[0]
            said = said[: len(said) - _uncertain(said, CALL)].removesuffix("\n")
        return self._new(thoughts, said or "")

    def finish(self) -> dict[str, Any]:
        """Return what was held back: no more text comes."""
        thoughts, said = self._divide(complete=True)
        message = read_reply(said, False, self._tools) if said and self._tools and END_THINK not in said else {}
        delta: dict[str, Any] = self._new(thoughts, message.get("content", said or ""))
        return delta | ({"tool_calls": message["tool_calls"]} if "tool_calls" in message else {})

    def _divide(self, complete: bool) -> tuple[str, str | None]:
        """Return thoughts and what is said; None: nothing yet, or it may be a thought still."""
        beginning = self._text if self._thinking else self._text.lstrip()
        if not complete and len(beginning) < len(THINK) and THINK.startswith(beginning):
            return "", None
        if not self._thinking and not beginning.startswith(THINK):
            return "", self._text
        thoughts, end, said = beginning.removeprefix(THINK).partition(END_THINK)
        return thoughts.strip("\n"), said.removeprefix("\n") if end else None

    def _new(self, thoughts: str, said: str) -> dict[str, str]:
        """Return what has not been sent of thoughts and content."""
        delta = {"reasoning_content": thoughts[self._thoughts :], "content": said[self._content :]}
        self._thoughts, self._content = max(self._thoughts, len(thoughts)), max(self._content, len(said))
        return {name: piece for name, piece in delta.items() if piece}


def _uncertain(text: str, mark: str) -> int:
    """Return how many characters at the end of a text may begin a mark."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-size:])), 0)
