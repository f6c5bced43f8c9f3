"""The text of a completion as its tokens come: whole characters only, and nothing after a stop string.

A token may end in the middle of a character and a stop string in the middle of a token, so text is held back until it
is certain: bytes that are no character yet, and an end that may turn out to be the beginning of a stop string.
"""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
"""Token ids to text; bytes that are no character show as U+FFFD."""
CONTEXT = 6
"""Tokens of the prompt decoded before the completion: what a token stands for may depend on the one before it (a
sentencepiece vocabulary drops the blank at a text's beginning)."""
_BROKEN = "\ufffd"


class TextStream:
    """Turns the tokens of one completion into text.

    Args:
        decode: the tokenizer's decoder.
        prompt: token ids before the completion.
        stop: stop strings, none of them empty; the text ends before the first that appears.
    """

    def __init__(self, decode: Decode, prompt: list[int], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._window = prompt[-CONTEXT:]  # tokens decoded last, and those that are no text yet
        self._known = decode(self._window)
        if self._known.endswith(_BROKEN):
            self._window, self._known = [], ""
        self._sent = 0
        self.text = ""
        """The text so far."""
        self.stopped = False
        """Whether a stop string has appeared."""

    def add(self, tokens: list[int]) -> bool:
        """Take tokens; return whether a stop string has appeared."""
        self._window += tokens
        decoded = self._decode(self._window)
        if not decoded.endswith(_BROKEN):
            self._append(decoded[len(self._known) :])
            self._window = self._window[-len(tokens) :]
            self._known = self._decode(self._window)
        return self.stopped

    def take(self) -> str:
        """Return the text that has become certain since the last call."""
        start = self._sent
        self._sent = max(start, len(self.text) - (0 if self.stopped else self._uncertain()))
        return self.text[start : self._sent]

    def finish(self) -> str:
        """Return what was held back: no more tokens come."""
        if not self.stopped:
            self._append(self._decode(self._window)[len(self._known) :])
        start, self._sent = self._sent, len(self.text)
        return self.text[start:]

    def _append(self, piece: str) -> None:
        searched = max(0, len(self.text) - self._longest + 1)
        self.text += piece
        found = [place for place in (self.text.find(word, searched) for word in self._stop) if place >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _uncertain(self) -> int:
        """Return how many characters at the end may begin a stop string."""
        tail = self.text[-(self._longest - 1) :] if self._longest > 1 else ""
        return next(
            (
                len(tail) - start
                for start in range(len(tail))
                if any(word.startswith(tail[start:]) for word in self._stop)
            ),
            0,
        )
