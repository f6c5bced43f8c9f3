"""Conversations as text: the chat template that a model's folder brings, rendered as transformers renders it.

A template is a Jinja program of the folder; transformers runs it in Jinja's sandbox (no files, no attributes that begin
with an underscore). transformers is imported when the first conversation is rendered (1.4 s).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.tokenizer import Tokenizer, special_names
from modules.errors import UserError

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
CHAT_ML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""For tokenizers without a template that have these two special tokens, as Nemotron's have."""

Message = dict[str, Any]
"""A turn: `role` (system, user, assistant, tool) and `content`; a template may read more keys."""


class ChatTemplate:
    """The chat template of a model.

    Args:
        tokenizer: the model's tokenizer; its folder may hold a template in chat_template.jinja or, older,
            tokenizer_config.json.

    Raises:
        UserError: if there is no template and the tokenizer lacks the tokens of the plain ChatML form.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = special_names(tokenizer.folder)
        found = _find(tokenizer.folder)
        self.is_own = found is not None
        """Whether the model brings a template; one that does not was hardly taught to chat."""
        self._source = found or self._plain()

    def render(self, messages: Sequence[Message], *, answer: bool, **variables: object) -> str:
        """Return a conversation as text.

        Args:
            messages: the turns.
            answer: whether the text ends with the beginning of the assistant's next turn.
            variables: what templates may know beyond the messages: `enable_thinking`, `tools`.

        Raises:
            UserError: if the template refuses the conversation or is broken.
        """
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        turns = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            rendered, _ = render_jinja_template(
                conversations=[turns],
                chat_template=self._source,
                add_generation_prompt=answer,
                **{**self._special, **variables},
            )
        except (TemplateError, TypeError) as error:
            raise UserError(f"chat template: it cannot render this conversation ({error})") from error
        return rendered[0]

    def encode(self, messages: Sequence[Message], *, answer: bool, **variables: object) -> list[int]:
        """Return a rendered conversation as token ids; the template's text says where special tokens stand."""
        return self._tokenizer.encode(self.render(messages, answer=answer, **variables), special_tokens=True)

    def encode_prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None, **variables: object
    ) -> list[int]:
        """Return a conversation, and the beginning of the assistant's next turn, as token ids."""
        return self.encode(messages, answer=True, tools=tools, **variables)

    def turn_end(self) -> int | None:
        """Return the special token that the template puts behind an assistant's text, None if it puts none there."""
        mark = "what the assistant says"
        text = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}], answer=False)
        after = self._tokenizer.encode(text.rpartition(mark)[2].lstrip(), special_tokens=True)
        return after[0] if after and after[0] in self._tokenizer.special_ids else None

    def _plain(self) -> str:
        marks = ("<|im_start|>", "<|im_end|>")
        special = self._tokenizer.special_ids
        for mark in marks:
            ids = self._tokenizer.encode(mark, special_tokens=True)
            if len(ids) != 1 or ids[0] not in special:
                raise UserError(
                    f"chat template: {self._tokenizer.folder} has no {TEMPLATE_FILE} and no chat_template in "
                    f"{CONFIG_FILE}, and its tokenizer has no {' and '.join(marks)} for the plain form; add a "
                    f"{TEMPLATE_FILE}"
                )
        return CHAT_ML


def _find(folder: Path | None) -> str | None:
    """Return the template of a tokenizer's folder: the file, else the (default) one in tokenizer_config.json."""
    if folder is None:
        return None
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    if not (folder / CONFIG_FILE).is_file():
        return None
    found = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("chat_template")
    if isinstance(found, list):  # several by name
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found
