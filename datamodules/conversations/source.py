"""Conversations as the documents of a corpus: how they are read, varied, rendered and fitted into rows.

The machinery is that of text (`datamodules/text`): a conversation is a document whose text is its JSON, so that equal
ones are found, and held out, in the same way. What a policy draws depends on the seed and the conversation alone: not
on the order, the shards or the number of processes.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from datamodules.conversations.masks import Mask, encode
from datamodules.conversations.messages import Conversation, ConversationError, read_conversation
from datamodules.conversations.policies import OverLong, ReasoningModes, in_mode, shorten
from datamodules.conversations.template import TEMPLATE_FILE, ChatTemplate
from datamodules.environments.draws import asked_in
from datamodules.text.mixture import hash64
from datamodules.text.policies import Document, Policies, Tally
from datamodules.text.rows import Tokenized
from datamodules.tokenizer import Tokenizer
from modules.errors import UserError

_MODES: dict[str, str] = {
    "thinking_off": "shown with thinking off",
    "low_effort": "shown with low effort",
    "truncated_thoughts": "thoughts ended at a random budget",
}
"""What is counted of each reasoning mode."""
_SHORTENED = {"turn": "longer than a row, ended after a turn", "cut": "longer than a row, cut"}


@dataclass(frozen=True, kw_only=True)
class ConversationOptions:
    """How conversations become rows."""

    mask: Mask = "generated"
    """Which tokens are learnt: what the model will have to write (generated), or what the template marks (template)."""
    template: str | None = None
    """Jinja file of the chat template; null takes the tokenizer's own, else ours."""
    special_tokens_in_content: bool = False
    """Whether names of special tokens in a message become control tokens, as in transformers; else they are text."""
    over_long: OverLong = "drop"
    """A conversation longer than a row: left out, ended after the last turn that fits, or cut where the row ends."""
    on_error: Literal["stop", "skip"] = "stop"
    """A malformed conversation: stop with its file and line, or leave it out and count it."""
    thinking_off: float = 0.0
    """Share of the conversations with thoughts that lose them, and are rendered with thinking off."""
    low_effort: float = 0.0
    """Share of the conversations with thoughts that are rendered with low effort."""
    truncated_thoughts: float = 0.0
    """Share of the conversations with thoughts whose last ones end at a random budget."""

    def __post_init__(self) -> None:
        """Check the shares."""
        shares = {key: getattr(self, key) for key in _MODES}
        for key, share in shares.items():
            if not 0 <= share <= 1:
                raise UserError(f"{key}: {share} is no share, give 0 to 1")
        if sum(shares.values()) > 1:
            raise UserError(f"thinking_off: {' + '.join(shares)} are more than 1: a conversation has one of them")

    @property
    def modes(self) -> ReasoningModes:
        """The shares of the reasoning modes."""
        return ReasoningModes(**{key: getattr(self, key) for key in _MODES})


@dataclass(frozen=True, kw_only=True)
class ConversationPolicies(Policies):
    """How sources of conversations are read."""

    kind = "conversations"
    bad_rows = "set on_error to skip"

    conversation: ConversationOptions = field(default_factory=ConversationOptions)
    """What was asked for."""
    held_out: frozenset[str] = frozenset()
    """Normalised texts of problems that the model will be judged by: a conversation that asks one is left out."""
    max_document_bytes: int = 1 << 62
    """Conversations are never split."""

    @property
    def is_strict(self) -> bool:
        """Whether a malformed conversation is an error."""
        return self.conversation.on_error == "stop"

    def options(self, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """Return what decides the content, as JSON; the template is told by its digest."""
        options = asdict(self.conversation) | {"kind": self.kind}
        if tokenizer is not None:
            options["template"] = _digest(self._template_source(tokenizer))
        return options

    def complete(self, folder: Path) -> None:
        """Put the chat template into the folder of the corpus's tokenizer: whoever takes that, chats in its form."""
        (folder / TEMPLATE_FILE).write_text(self._template_source(Tokenizer.load(folder)), encoding="utf-8")

    def text_of(self, record: dict[str, Any], name: str, size: int, tally: Tally) -> str | None:
        """Return a conversation as JSON, or None where it is malformed and to be skipped.

        The text is of what was understood, not of the row: whatever else that holds, two equal conversations are equal.
        """
        try:
            conversation = read_conversation(record, name)
            text = json.dumps(asdict(conversation) | {"place": ""}, ensure_ascii=False)
            text.encode()
        except RecursionError:
            return self._leave_out(_too_deep(name), size, tally)
        except ConversationError as error:
            return self._leave_out(error, size, tally)
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no UTF-8 can hold
            error = ConversationError("broken text", "a text holds half a character (a lone surrogate)", name)
            return self._leave_out(error, size, tally)
        if not self.held_out.isdisjoint(asked_in(conversation.messages)):
            return tally.skip("asks a held-out problem", name, size)
        return text

    def decode(self, data: bytes, name: str, tally: Tally, file: bool = False) -> str | None:
        """Return the text of a line, or None where it is not UTF-8 and to be skipped."""
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            return self.no_text(name, f"byte {error.start} is not UTF-8", len(data), tally)

    def binary(self, name: str, size: int, tally: Tally) -> None:
        """Count a file that is no text at all."""
        self.no_text(name, "binary, not text", size, tally)

    def tokenize(
        self, documents: list[Document], tokenizer: Tokenizer, capacity: int, seed: int, tally: Tally
    ) -> Iterator[Tokenized]:
        """Yield the conversations that fit into a row of `capacity` tokens, or are made to."""
        template = _load_template(tokenizer.folder, self.conversation.special_tokens_in_content)
        for document in documents:
            try:
                yield from self._tokenize(document, template, capacity, seed, tally)
            except ConversationError as error:
                self._leave_out(error, len(document.text.encode()), tally)
            except RecursionError:
                self._leave_out(_too_deep(document.name), len(document.text.encode()), tally)

    def _tokenize(
        self, document: Document, template: ChatTemplate, capacity: int, seed: int, tally: Tally
    ) -> Iterator[Tokenized]:
        options = self.conversation
        size = len(document.text.encode())
        conversation = Conversation(**json.loads(document.text) | {"place": document.name})
        number = hash64(document.text)
        if (mode := options.modes.draw(seed, number)) is not None:
            usual, conversation = conversation, in_mode(conversation, mode, template, seed, number)
            if conversation is not usual:
                tally.change(_MODES[mode], document.name, size)
        whole = encode(conversation, template, options.mask)
        encoded = shorten(whole, capacity, options.over_long)
        if encoded is None:
            return tally.skip("longer than a row", document.name, size)
        if encoded is not whole:
            tally.change(_SHORTENED[options.over_long], document.name, size)
        yield Tokenized(tokens=encoded.tokens, mask=encoded.mask, weight=conversation.weight)

    def _leave_out(self, error: ConversationError, size: int, tally: Tally) -> None:
        """Count a conversation that cannot be used, by what is wrong with it."""
        if self.is_strict:
            raise UserError(f"{error}; mend it, or {self.bad_rows}") from None
        tally.skip(error.kind, error.place or "", size)

    def _template_source(self, tokenizer: Tokenizer) -> str:
        if self.conversation.template is None:
            return ChatTemplate(tokenizer).source
        try:
            return Path(self.conversation.template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"template: {self.conversation.template} cannot be read ({error}); give a Jinja file"
            ) from None


def conversation_key(row: dict[str, Any]) -> str | None:
    """Return the key by which a row looks like a conversation, None if it does not."""
    keys = ("messages", "conversations", *(("prompt",) if "completion" in row else ()))
    return next((key for key in keys if key in row), None)


def _too_deep(name: str) -> ConversationError:
    return ConversationError("nested too deeply", "arguments or tools are nested too deeply", name)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@functools.lru_cache(maxsize=2)
def _load_template(folder: Path, special_tokens_in_content: bool) -> ChatTemplate:
    return ChatTemplate(Tokenizer.load(folder), special_tokens_in_content)
