"""Token ids as text that a person can read and that no byte of is lost or hidden.

Byte-level vocabularies cut characters: a token alone may be two bytes of three. Such bytes are shown in hexadecimal,
`⟨E6⟩`, and the character follows the token that completes it. Blanks other than the space, control characters and
invisible ones get a mark, so that no text of a corpus can steer a terminal or hide in a page.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from datamodules.tokenizer import Tokenizer

CHAT_START = "<|im_start|>"
"""Name of the special token that begins a turn of a conversation."""
_INVISIBLE = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"}  # Unicode categories


class _Marks(dict[int, str]):
    """Character number -> what is shown for it, for `str.translate`; filled on demand."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        shown = f"⟨U+{code:04X}⟩" if unicodedata.category(character) in _INVISIBLE else character
        self[code] = shown
        return shown


_MARKS = _Marks({code: chr(0x2400 + code) for code in range(32)} | {9: "⇥\t", 10: "↵\n", 32: " ", 127: "␡"})


@dataclass(frozen=True, slots=True)
class Token:
    """How a token is shown."""

    text: str
    """Visible text; a line break is `↵` and the break, a tabulator `⇥` and the tabulator."""
    kind: Literal["text", "special", "bytes", "unknown"]
    """`bytes`: holds a part of a character; `unknown`: an id that the tokenizer does not use."""

    @property
    def line(self) -> str:
        """The text without breaks."""
        return self.text.replace("\n", "").replace("\t", "")


class Vocabulary:
    """The tokens of a tokenizer as text.

    Args:
        tokenizer: a byte-level or sentencepiece-like one.

    Raises:
        UserError: if it is another kind.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._contents = tokenizer.contents()
        self._special = tokenizer.special_ids
        self._whole: dict[int, Token | None] = {}
        self.eos_id, self.pad_id = tokenizer.eos_id, tokenizer.pad_id
        self.chat_start_id = self.special_id(CHAT_START)
        """Id of `CHAT_START`, or None in a vocabulary without it."""

    def special_id(self, name: str) -> int | None:
        """Return the id of a special token, or None in a vocabulary without it."""
        return next((index for index in self._special if self._contents[index] == name.encode()), None)

    def knows(self, index: int) -> bool:
        """Return whether the tokenizer uses an id."""
        return 0 <= index < len(self._contents) and self._contents[index] != b""

    def text(self, index: int) -> str:
        """Return what a token stands for, as it is; empty for an id that the tokenizer does not use."""
        return self._contents[index].decode(errors="replace") if self.knows(index) else ""

    def show(self, ids: Sequence[int]) -> list[Token]:
        """Return how the tokens of a stretch of text are shown, one for each id."""
        shown: list[Token] = []
        first = 0
        while first < len(ids):
            token, last = self._show_whole(ids[first]), first + 1
            if token is not None:
                shown.append(token)
            else:
                while last < len(ids) and self._show_whole(ids[last]) is None:
                    last += 1
                shown += _show_parts([self._contents[index] for index in ids[first:last]])
            first = last
        return shown

    def _show_whole(self, index: int) -> Token | None:
        """Return how a token is shown that needs no neighbour, None for one with a part of a character."""
        if index not in self._whole:
            self._whole[index] = self._decode(index)
        return self._whole[index]

    def _decode(self, index: int) -> Token | None:
        if not self.knows(index):
            return Token(f"⟨id {index}⟩", "unknown")
        try:
            text = self._contents[index].decode().translate(_MARKS)
        except UnicodeDecodeError:
            return None
        return Token(text, "special" if index in self._special else "text")


def _show_parts(contents: list[bytes]) -> list[Token]:
    """Return the tokens of a stretch whose tokens are no whole characters by themselves."""
    data = b"".join(contents)
    owners = [number for number, content in enumerate(contents) for _ in content]
    texts, loose = [""] * len(contents), [b""] * len(contents)
    for first, last, character in _split(data):
        owner = owners[last - 1]
        if character is None or owners[first] != owner:
            for position in range(first, last):
                loose[owners[position]] += data[position : position + 1]
        if character is not None:
            texts[owner] += _hex(loose[owner]) + character.translate(_MARKS)
            loose[owner] = b""
    return [Token(text + _hex(rest), "bytes") for text, rest in zip(texts, loose, strict=True)]


def _split(data: bytes) -> Iterator[tuple[int, int, str | None]]:
    """Yield start, end and character of each UTF-8 sequence; None for a byte that belongs to none."""
    start = 0
    while start < len(data):
        lead = data[start]
        end = start + (1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4)
        try:
            character = data[start:end].decode()
        except UnicodeDecodeError:
            end, character = start + 1, None
        yield start, end, character
        start = end


def _hex(data: bytes) -> str:
    return f"⟨{data.hex(' ').upper()}⟩" if data else ""
