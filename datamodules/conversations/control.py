"""Control tokens of a rendered conversation, kept apart from their names in what people and tools say.

A template writes `<|im_end|>` to end a turn; a message may hold the same ten characters. Rendered text shows no
difference, so they are told apart before and after rendering.

Before: in everything that a conversation brings, one character of each name is replaced by a private one (of Unicode's
private use area, from a block that the conversation does not use). A private character is no blank and counts as one
character, so `trim`, `length`, `split` and the like do as they would; what a template searches for is an assistant's
thought, whose two tags therefore stay as they are. After: whole names that are left were written by the template. They
go to private names of the same length, private characters go back, and a copy of the tokenizer that knows control
tokens by their private names encodes the text in one go: what the tokenizer does around control tokens and to other
added tokens stays its own, and positions in the text hold.

Names may also come together at the seams: a template that writes `'<' ~ key ~ '>'` makes a control token of the key
`think`. A text that could be a part of a name so, at its beginning, its end or as a whole, has a private character
there.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import tokenizers

from datamodules.conversations.messages import ConversationError
from datamodules.tokenizer import Tokenizer

BLOCKS = range(0xE000, 0xF800, 0x100)
"""Beginnings of the private blocks to choose from."""
THOUGHT = ("<think>", "</think>")
"""What begins and ends a thought in an assistant's content, in the templates that read it from there."""


def common_length(first: str, second: str) -> int:
    """Return the number of characters that two texts begin with alike."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[:middle] == second[:middle] else (low, middle - 1)
    return low


class ControlTokens:
    """The control tokens of a tokenizer and a template.

    These are the special tokens, and those other added tokens that the template writes: some tokenizers do not call
    `<think>` special.

    Args:
        tokenizer: the tokenizer.
        source: the template.
        words: names of keys and values by which the template decides; they are never touched.
        in_content: whether names in messages are control tokens too.
    """

    def __init__(self, tokenizer: Tokenizer, source: str, words: frozenset[str], in_content: bool) -> None:
        added = tokenizer.added_tokens()
        self._tokenizer = tokenizer
        self.ids = {
            token.content: index
            for index, token in added.items()
            if token.special or (token.content in source and not token.content.isalnum() and token.content.strip())
        }
        """Id of each control token by its name."""
        names = sorted(self.ids, key=len, reverse=True)
        single = {token.content for token in added.values() if token.single_word}
        patterns = [rf"(?<!\w){re.escape(name)}(?!\w)" if name in single else re.escape(name) for name in names]
        self.pattern = re.compile("|".join(patterns) or "(?!)")
        self.alphabet = sorted({character for name in names for character in name})
        assert len(self.alphabet) <= BLOCKS.step, "names of control tokens have too many characters"
        self._beginnings = {name[:end] for name in names for end in range(1, len(name))}
        self._endings = {name[start:] for name in names for start in range(1, len(name))}
        self._middles = "\0".join(name[1:-1] for name in names)
        self._longest = max(map(len, names), default=0)
        self._words = {word for word in words if not self.pattern.search(word)}
        self._in_content = in_content
        self._blocks: dict[int, Block] = {}

    def block(self, *values: object) -> "Block":
        """Return a private block that these values (messages, tools, ...) do not use.

        Raises:
            ConversationError: a text is no Unicode (half a character), or uses all blocks.
        """
        text = json.dumps(values, ensure_ascii=False, default=str)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConversationError("broken text", "a text holds half a character (a lone surrogate)") from None
        used = {ord(character) & ~0xFF for character in text if "\ue000" <= character <= "\uf8ff"}
        for start in BLOCKS:
            if start not in used and f"\\u{start >> 8:x}" not in text:
                if start not in self._blocks:
                    self._blocks[start] = Block(self, self._tokenizer, start)
                return self._blocks[start]
        raise ConversationError("broken text", "the conversation uses every private block of Unicode")

    def places(self, text: str) -> Iterator[int]:
        """Yield positions of characters to hide, so that the text neither holds nor completes a name."""
        if self._in_content:
            return
        for match in self.pattern.finditer(text):
            yield match.start()
        core = text.strip()
        if not core or core in self._words:
            return
        start = len(text) - len(text.lstrip())
        end = start + len(core) - 1
        sizes = range(1, min(len(core) + 1, self._longest))
        if core in self._middles or any(core[:size] in self._endings for size in sizes):
            yield start
        if any(core[-size:] in self._beginnings for size in sizes):
            yield end

    def is_word(self, key: str) -> bool:
        """Return whether the template reads this key."""
        return key in self._words


class Block:
    """Private characters, and the tokenizer that knows control tokens by names made of them.

    Args:
        control: the control tokens.
        tokenizer: the tokenizer.
        start: code point of the first private character.
    """

    def __init__(self, control: ControlTokens, tokenizer: Tokenizer, start: int) -> None:
        self._control, self._tokenizer = control, tokenizer
        self._private = {character: chr(start + n) for n, character in enumerate(control.alphabet)}
        self._public = {private: character for character, private in self._private.items()}
        first, last = chr(start), chr(start + 0xFF)
        escaped = rf"\\u{start >> 8:x}[0-9a-f]{{2}}"  # as JSON or Python's repr may write a private character
        self._settled = re.compile(rf"[{first}-{last}]|{escaped}|{control.pattern.pattern}")
        self.ids = control.ids
        """Id of each control token by its (public) name."""

    def name(self, public: str) -> str:
        """Return the private name of a control token."""
        return "".join(self._private[character] for character in public)

    def tag(self, public: str) -> str:
        """Return a name as it stands in settled text where the template wrote it, control token or not."""
        return self.name(public) if public in self.ids else public

    def holds_control(self, text: str) -> bool:
        """Return whether the template wrote a control token in settled text."""
        return self._written.search(text) is not None

    def shared(self, first: str, second: str) -> int:
        """Return the length of the common beginning of two settled texts, whole control tokens only."""
        size = common_length(first, second)
        cut = (match.start() for match in self._written.finditer(first) if match.start() < size < match.end())
        return next(cut, size)

    def hide(self, value: Any) -> Any:
        """Return a value of a conversation in which no text holds or completes the name of a control token."""
        if isinstance(value, str):
            return self._hide_text(value)
        if isinstance(value, Mapping):
            keys = {key: key if self._control.is_word(key) else self._hide_text(key) for key in value}
            return {keys[key]: self.hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        return value

    def hide_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return a turn as `hide` does, but for its role, its keys, and the thought in an assistant's content.

        An assistant's content may hold its thought; its tags are the first `<think>` and the last `</think>`, by which
        templates find it. Further ones are text.
        """
        hidden = {key: value if key == "role" else self.hide(value) for key, value in message.items()}
        content = message.get("content")
        if message.get("role") == "assistant" and isinstance(content, str):
            for tag, at in ((THOUGHT[0], content.find(THOUGHT[0])), (THOUGHT[1], content.rfind(THOUGHT[1]))):
                if at >= 0:
                    hidden["content"] = hidden["content"][:at] + tag + hidden["content"][at + len(tag) :]
        return hidden

    def settle(self, text: str) -> str:
        """Return rendered text with control tokens under their private names and all else as it was given."""

        def settled(match: re.Match[str]) -> str:
            found = match[0]
            if found in self.ids:
                return self.name(found)
            return self._public[chr(int(found[2:], 16)) if len(found) > 1 else found]

        return self._settled.sub(settled, text)

    def encode(self, text: str) -> tokenizers.Encoding:
        """Return the tokens of settled text, with positions.

        Raises:
            ConversationError: the tokenizer makes control tokens of plain text too.
        """
        encoding = self._renamed.encode(text, add_special_tokens=False)
        ids = frozenset(self.ids.values())
        found = sum(index in ids for index in encoding.ids)
        if found != len(self._written.findall(text)):
            raise ConversationError("broken text", "the tokenizer makes a control token of plain text")
        return encoding

    @cached_property
    def _written(self) -> re.Pattern[str]:
        return re.compile("|".join(sorted(map(self.name, self.ids), key=len, reverse=True)) or "(?!)")

    @cached_property
    def _renamed(self) -> tokenizers.Tokenizer:
        return self._tokenizer.renamed({name: self.name(name) for name in self.ids})

    def _hide_text(self, text: str) -> str:
        characters = None
        for at in self._control.places(text):
            characters = characters or list(text)
            characters[at] = self._private[text[at]]
        return text if characters is None else "".join(characters)
