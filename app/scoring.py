"""What a model scores or completes: which tokens a row is, which of them are the completion, and what scored rows say.

Together they say: likelihood, perplexity, bits per byte, divergence.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

from app.models import check_same_tokenizer, open_tokenizer
from app.rows_file import text_of
from datamodules.conversations.masks import encode
from datamodules.conversations.messages import Conversation, ConversationError, read_messages, read_tools
from datamodules.conversations.template import ChatTemplate
from datamodules.tokenizer import Tokenizer
from modules.batch import Message
from modules.checkpoints.source import ModelFolder
from modules.errors import UserError


class Tokens(NamedTuple):
    """A row as the network sees it."""

    ids: list[int]
    completion_start: int | None
    """Position of the completion's first token in `ids`; None: the row has no completion."""


class Reader:
    """Turns rows into tokens.

    Args:
        source: the MODEL; its tokenizer and chat template are opened when a row needs them.
        tools: those of conversations that are to be gone on with and have no `tools` of their own.
        variables: what the template is told of these conversations, see `app.talk.template_variables`.
    """

    def __init__(
        self,
        source: ModelFolder,
        tools: Sequence[dict[str, Any]] = (),
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._source, self._tools, self._variables = source, tools, variables

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The MODEL's tokenizer."""
        return open_tokenizer(self._source)

    @cached_property
    def fingerprint(self) -> str | None:
        """Fingerprint of the MODEL's tokenizer, which rows of token ids carry; None: it brings none."""
        return None if self._source.tokenizer_folder is None else self.tokenizer.fingerprint

    @cached_property
    def template(self) -> ChatTemplate:
        """The MODEL's chat template."""
        return ChatTemplate(self.tokenizer)

    def tokens(self, row: dict[str, Any], where: str) -> Tokens:
        """Return the tokens of a row.

        Args:
            row: the row; of the forms that `score --help` lists the first one that fits counts.
            where: how to name it in an error (FILE:LINE).

        Raises:
            UserError: it is of none of the forms, or a value is wrong.
        """
        if "token_ids" in row:
            return self._given(row, where)
        if "completion" in row or "completion_ids" in row:
            return self._completed(row, where)
        if "messages" in row:
            return self._conversation(row, where)
        if "text" in row:
            return Tokens(self.tokenizer.encode_prompt(text_of(row, "text", where)), None)
        keys = ", ".join(row) or "no key"
        raise UserError(f"{where}: a row needs text, or prompt and completion, or messages; this one has {keys}")

    def prompt(self, row: dict[str, Any], where: str) -> list[int]:
        """Return the tokens of a row's prompt: `prompt_ids`, the text `prompt`, or the turns `messages`.

        Args:
            row: the row.
            where: how to name it in an error (FILE:LINE).

        Raises:
            UserError: it has none of them, or a value is wrong.
        """
        if "prompt_ids" in row:
            return self._ids(row, "prompt_ids", where)
        if "prompt" in row:
            return self.tokenizer.encode_prompt(text_of(row, "prompt", where))
        if "messages" in row:
            messages, tools = self._turns(row, where)
            try:
                return self.template.encode_prompt(messages, tools, **self._variables)
            except ConversationError as error:
                raise error.at(where) from None
        raise UserError(f"{where}: the row has no prompt (prompt, prompt_ids or messages); add one")

    @property
    def turn_ends(self) -> list[int]:
        """Tokens that end the assistant's turn in the conversations read so far; none if there was no conversation."""
        end = self.template.turn_end() if "template" in vars(self) else None
        return [] if end is None else [end]

    def token_bytes(self) -> list[int] | None:
        """Return the UTF-8 bytes of each of the V ids; None without a tokenizer, or if its tokens stand for none."""
        known = None if self._source.tokenizer_folder is None else token_bytes(self.tokenizer)
        return None if known is None else known + [0] * (self._source.config.vocab_size - len(known))

    def _given(self, row: dict[str, Any], where: str) -> Tokens:
        ids = self._ids(row, "token_ids", where)
        start = row.get("completion_start")
        if start is not None and (type(start) is not int or not 0 <= start <= len(ids)):
            raise UserError(f"{where}: completion_start must be a position in token_ids, 0 to {len(ids)}")
        return Tokens(ids, start)

    def _completed(self, row: dict[str, Any], where: str) -> Tokens:
        """Return prompt and completion, each tokenised by itself, as a completion that was generated is."""
        prompt = self.prompt(row, where)
        if "completion_ids" in row:
            completion = self._ids(row, "completion_ids", where)
        else:
            completion = self.tokenizer.encode(text_of(row, "completion", where))
        return Tokens(prompt + completion, len(prompt))

    def _conversation(self, row: dict[str, Any], where: str) -> Tokens:
        """Return a conversation whose last turn, the assistant's with its end mark, is the completion."""
        messages, tools = self._turns(row, where)
        if messages[-1]["role"] != "assistant":
            raise UserError(f"{where}: messages must end with the assistant's turn: it is what is scored")
        given = len(messages) - 1
        encoded = encode(Conversation(messages=messages, tools=tools, prompt_turns=given, place=where), self.template)
        (written,) = encoded.mask.nonzero()
        return Tokens(encoded.tokens[: written[-1] + 1].tolist(), int(written[0]))

    def _turns(self, row: dict[str, Any], where: str) -> tuple[list[Message], list[dict[str, Any]]]:
        try:
            return read_messages(row["messages"]), read_tools(row["tools"]) if "tools" in row else list(self._tools)
        except ConversationError as error:
            raise error.at(where) from None

    def _ids(self, row: dict[str, Any], key: str, where: str) -> list[int]:
        ids, size = row[key], self._source.config.vocab_size
        if not isinstance(ids, list) or not all(type(index) is int and 0 <= index < size for index in ids):
            raise UserError(f"{where}: {key} must be a list of token ids from 0 to {size - 1}, the model's vocabulary")
        if self.fingerprint is not None and row.get("tokenizer", self.fingerprint) != self.fingerprint:
            raise UserError(
                f"{where}: {key} were written by another tokenizer (key tokenizer) than that of {self._source.path}; "
                f"take the model that wrote them, or remove {key} where the row has the text"
            )
        return ids


def token_bytes(tokenizer: Tokenizer) -> list[int] | None:
    """Return the UTF-8 bytes of each token id; None if the tokenizer's tokens stand for no exact bytes."""
    try:
        return tokenizer.token_bytes().tolist()
    except UserError:
        return None


def same_vocabulary(source: ModelFolder, reference: ModelFolder) -> None:
    """Check that the distributions of two models are over the same tokens.

    Raises:
        UserError: they are not.
    """
    sizes = source.config.vocab_size, reference.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(
            f"reference: {reference.path} has a vocabulary of {sizes[1]:,}, {source.path} one of {sizes[0]:,}"
        )
    check_same_tokenizer(source, reference, "reference")


def summarise(rows: Iterable[dict[str, Any]], token_bytes: Sequence[int] | None) -> dict[str, Any]:
    """Return the figures of scored rows.

    A row's completion counts where it has one, else all of its tokens after the first. Means are over tokens, not over
    rows.

    Args:
        rows: with token_ids, logprobs and, where they have them, completion_start and kl.
        token_bytes: UTF-8 bytes of each of the V token ids; None: not known.

    Returns:
        rows, tokens; and of those tokens nll (mean, nats), perplexity, bits_per_byte (all bits over the bytes of the
        scored tokens) and kl (mean, nats); None where there is nothing to divide by.
    """
    count, tokens, size, nll = 0, 0, 0, 0.0
    divergences: list[float] = []
    for row in rows:
        start = max((row.get("completion_start") or 1) - 1, 0)
        scored = row["logprobs"][start:]
        count += 1
        tokens += len(scored)
        nll -= math.fsum(scored)
        if token_bytes is not None:
            size += sum(token_bytes[index] for index in row["token_ids"][start + 1 :])
        if "kl" in row:
            divergences.append(math.fsum(row["kl"][start:]))
    mean = nll / tokens if tokens else None
    return {
        "rows": count,
        "tokens": tokens,
        "nll": mean,
        "perplexity": None if mean is None else math.exp(mean),
        "bits_per_byte": nll / math.log(2) / size if size else None,
        "kl": math.fsum(divergences) / tokens if divergences and tokens else None,
    }


def describe(summary: dict[str, Any]) -> str:
    """Return the figures as one line."""
    parts = [f"{summary['rows']:,} rows, {summary['tokens']:,} tokens scored"]
    if summary["nll"] is not None:
        parts += [f"mean nll {summary['nll']:.4f} nats", f"perplexity {summary['perplexity']:.4f}"]
    if summary["bits_per_byte"] is not None:
        parts.append(f"bits per byte {summary['bits_per_byte']:.4f}")
    if summary["kl"] is not None:
        parts.append(f"mean KL {summary['kl']:.6f} nats")
    return ", ".join(parts)
