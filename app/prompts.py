"""Prompts of users as token ids: plain text, token ids, or a conversation.

In plain text the names of special tokens are text: a document that spells `</s>` must not end there. Only a chat
template writes special tokens.
"""

from typing import TYPE_CHECKING, Any

from app.errors import UserError
from app.rows_file import text_of
from datamodules.chat_template import ChatTemplate

if TYPE_CHECKING:
    from datamodules.tokenizer import Tokenizer
    from modules.checkpoints.source import Source


class PromptEncoder:
    """Turns rows into token ids.

    Args:
        source: the model.
        tokenizer: its tokenizer, if it brings one.
    """

    def __init__(self, source: "Source", tokenizer: "Tokenizer | None") -> None:
        self._source, self._tokenizer = source, tokenizer
        self._template: ChatTemplate | None = None
        self.eos_ids = source.generation.eos_token_ids
        """Tokens that end a completion: the model's, and the end of a turn once a conversation was rendered."""

    def encode(self, row: dict[str, Any], name: str) -> list[int]:
        """Return the token ids of a row's prompt.

        Args:
            row: holds `prompt` (text or token ids) or `messages`.
            name: what to call the row in an error.

        Raises:
            UserError: it holds neither, or something else, or tokens that the model does not know.
        """
        if "prompt" in row:
            ids = self._encode_prompt(row["prompt"], name)
        elif "messages" in row:
            ids = self._encode_messages(row["messages"], name)
        else:
            raise UserError(f"{name}: the row has no prompt (nor messages); add the key")
        if not ids:
            raise UserError(f"{name}: prompt is empty; give it at least one character")
        vocab_size = self._source.config.vocab_size
        for token in ids:
            if not 0 <= token < vocab_size:
                raise UserError(f"{name}: prompt holds token id {token}, but the model knows 0 to {vocab_size - 1}")
        return ids

    def _encode_prompt(self, prompt: object, name: str) -> list[int]:
        if isinstance(prompt, list) and all(type(token) is int for token in prompt):
            return prompt
        if not isinstance(prompt, str):
            raise UserError(f"{name}: prompt must be a text or a list of token ids")
        text = text_of({"prompt": prompt}, "prompt", name)
        return self._known_tokenizer(name).encode_prompt(text) if text else []

    def _encode_messages(self, messages: object, name: str) -> list[int]:
        if not (isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)):
            raise UserError(f"{name}: messages must be a list of objects with role and content")
        try:
            if self._template is None:
                self._template = ChatTemplate(self._known_tokenizer(name))
                end = self._template.turn_end()
                self.eos_ids = tuple(dict.fromkeys([*self.eos_ids, *([] if end is None else [end])]))
            return self._template.encode(messages, answer=True)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error

    def _known_tokenizer(self, name: str) -> "Tokenizer":
        if self._tokenizer is None:
            raise UserError(
                f"{name}: {self._source.path} brings no tokenizer; give --prompts with rows whose prompt is a list of "
                "token ids"
            )
        return self._tokenizer
