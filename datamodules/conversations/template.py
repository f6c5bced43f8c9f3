"""Conversations as text and tokens: the chat template that a model's folder brings, or ours.

A template is a Jinja program of the folder; transformers runs it in Jinja's sandbox (no files, no attributes that begin
with an underscore). transformers is imported when the first conversation is rendered (1.4 s).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from datamodules.conversations.control import THOUGHT, Block, ControlTokens
from datamodules.conversations.messages import ConversationError
from datamodules.tokenizer import Tokenizer, special_names
from modules.batch import Message
from modules.errors import UserError

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
TURN_MARKS = ("<|im_start|>", "<|im_end|>")
CHAT_ML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""For tokenizers that have the marks of turns, but none of thoughts, and no template."""
NEMOTRON = Path(__file__).parent / "nemotron.jinja"
"""For tokenizers that have both and no template: all that we train."""
LOW_EFFORT = "\n\n{reasoning effort: low}"
BUDGET = "\n\n{{thinking token budget: {}}}"
"""How Nemotron's users ask for little thought, at the end of their last turn; templates that know `low_effort` and
`reasoning_budget` write it themselves."""


@dataclass(frozen=True)
class Rendering:
    """A conversation as text."""

    text: str
    """The text, control tokens that the template wrote under the private names of `block`."""
    marked: list[tuple[int, int]]
    """Beginning and end of what the template marks as the assistant's ({% generation %})."""
    block: Block
    """Private names, and the tokenizer that knows them."""


class ChatTemplate:
    """The chat template of a model.

    Args:
        tokenizer: the model's tokenizer; its folder may hold a template in chat_template.jinja or, older,
            tokenizer_config.json. Without one: our Nemotron template where the tokenizer has the tokens of turns and
            thoughts, plain ChatML where it has those of turns.
        special_tokens_in_content: whether names of special tokens in messages, tools and calls become those tokens, as
            in transformers: a user's text can then end its turn and begin the assistant's.

    Raises:
        UserError: if there is no template and the tokenizer lacks the tokens of the plain ChatML form, or the template
            is no Jinja.
    """

    def __init__(self, tokenizer: Tokenizer, special_tokens_in_content: bool = False) -> None:
        from jinja2 import Environment, TemplateError, nodes
        from jinja2.meta import find_undeclared_variables

        self.tokenizer = tokenizer
        self.special_tokens_in_content = special_tokens_in_content
        found = _find(tokenizer.folder)
        self.is_own = found is not None
        """Whether the model brings a template; one that does not was hardly taught to chat."""
        self.source = found or self._ours()
        """The template."""
        self.has_marks = bool(_MARK.search(self.source))
        """Whether the template marks what the assistant says."""
        self._special = special_names(tokenizer.folder)
        self._begun: dict[Block, list[str]] = {}
        environment = Environment(extensions=["jinja2.ext.loopcontrols"])
        try:
            tree = environment.parse(_MARK.sub("", self.source))
        except TemplateError as error:
            raise UserError(f"chat template: it is no Jinja ({error}); mend {TEMPLATE_FILE}") from error
        self.variables = frozenset(find_undeclared_variables(tree))
        """Names of the variables that the template reads."""
        words = {node.attr for node in tree.find_all(nodes.Getattr)}
        words |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        self._control = ControlTokens(tokenizer, self.source, frozenset(words), special_tokens_in_content)

    def render(
        self,
        messages: Sequence[Message],
        *,
        answer: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: object,
    ) -> str:
        """Return a conversation as text, as transformers renders it.

        Args:
            messages: the turns.
            answer: whether the text ends with the beginning of the assistant's next turn.
            tools: what the model may call, in OpenAI's form.
            variables: what templates may know beyond that: `enable_thinking`, `low_effort`, `reasoning_budget`
                (tokens), `truncate_history_thinking`.

        Raises:
            ConversationError: if the template refuses the conversation or is broken.
        """
        return self._render([_without_none(message) for message in messages], list(tools or []), answer, variables)[0]

    def encode(
        self,
        messages: Sequence[Message],
        *,
        answer: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: object,
    ) -> list[int]:
        """Return a conversation as token ids; takes and raises what `render` does."""
        rendering = self.trace(messages, self.block(messages, tools), answer=answer, tools=tools, **variables)
        return rendering.block.encode(rendering.text).ids

    def encode_prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None, **variables: object
    ) -> list[int]:
        """Return the token ids that the assistant's next turn goes on from; takes and raises what `render` does."""
        return self.encode(messages, answer=True, tools=tools, **variables)

    def block(self, *values: object) -> Block:
        """Return private names that a conversation of these values (messages, tools) does not use."""
        return self._control.block(*values)

    def trace(
        self,
        messages: Sequence[Message],
        block: Block,
        *,
        answer: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: object,
    ) -> Rendering:
        """Return a conversation as text in which control tokens are told from their names in messages.

        Args:
            messages: the turns.
            block: private names, of `block`; renderings that are compared share it.
            answer: as in `render`.
            tools: as in `render`.
            variables: as in `render`.

        Raises:
            ConversationError: as in `render`.
        """
        turns = [block.hide_message(_without_none(message)) for message in messages]
        text, marked = self._render(turns, block.hide(list(tools or [])), answer, variables)
        borders = [0, *(border for span in marked for border in span), len(text)]
        pieces = [block.settle(text[start:end]) for start, end in pairwise(borders)]
        lengths = [0]
        for piece in pieces:
            lengths.append(lengths[-1] + len(piece))
        return Rendering("".join(pieces), list(zip(lengths[1::2], lengths[2::2], strict=False)), block)

    def written_tokens(self) -> dict[str, int]:
        """Return the ids of the control tokens that the template writes, by name."""
        by_role = [name for role, name in self._special.items() if role in self.variables]
        return {name: index for name, index in self._control.ids.items() if name in self.source or name in by_role}

    def turn_end(self) -> int | None:
        """Return the control token that the template puts behind an assistant's text, None if there is none."""
        return self._turn_end

    def name_of(self, control_token: int) -> str:
        """Return the name of a control token."""
        return next(name for name, index in self._control.ids.items() if index == control_token)

    def generation_prompts(self, block: Block) -> list[str]:
        """Return how the template may begin an assistant's turn, with thinking on, off and unsaid, the longest first.

        Texts under the private names of a block; none if that cannot be told from a conversation of one turn.
        """
        if block not in self._begun:
            messages: list[Message] = [{"role": "user", "content": "a"}]
            prompts = set[str]()
            wishes: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": True}, {"enable_thinking": False})
            for variables in wishes:
                before = self.trace(messages, block, answer=False, **variables).text
                begun = self.trace(messages, block, answer=True, **variables).text
                if begun.startswith(before):
                    prompts.add(begun[len(before) :])
            self._begun[block] = sorted(prompts, key=len, reverse=True)
        return self._begun[block]

    @cached_property
    def _turn_end(self) -> int | None:
        mark = "what the assistant says"
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
        block = self.block(messages)
        after = self.trace(messages, block, answer=False).text.rpartition(mark)[2].lstrip()
        return next((index for name, index in block.ids.items() if after.startswith(block.name(name))), None)

    def _render(
        self, turns: list[Message], tools: list[Any], answer: bool, variables: dict[str, Any]
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return a rendered conversation and what the template marks in it."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(  # annotated as a text; it returns texts and what is marked in them
                conversations=[self._with_wishes(turns, variables)],
                tools=tools or None,
                chat_template=self.source,
                add_generation_prompt=answer,
                return_assistant_tokens_mask=self.has_marks,
                **{**self._special, **variables},
            )
        except (TemplateError, TypeError) as error:
            reason = f"chat template: it cannot render this conversation ({error})"
            raise ConversationError("refused by the chat template", reason) from error
        texts, marked = rendered
        return texts[0], marked[0] if self.has_marks else []

    def _with_wishes(self, turns: list[Message], variables: Mapping[str, Any]) -> list[Message]:
        """Return the turns with what the user asks of thoughts, as far as the template does not write it itself."""
        wishes = ""
        if variables.get("low_effort") and "low_effort" not in self.variables:
            wishes += LOW_EFFORT
        budget = variables.get("reasoning_budget")
        if budget is not None and "reasoning_budget" not in self.variables:
            wishes += BUDGET.format(budget)
        last = max((n for n, turn in enumerate(turns) if turn["role"] == "user"), default=None)
        if not wishes or last is None:
            return turns
        asked = {**turns[last], "content": f"{turns[last]['content']}{wishes}"}
        return [*turns[:last], asked, *turns[last + 1 :]]

    def _ours(self) -> str:
        special = {token.content for token in self.tokenizer.added_tokens().values()}
        if not special.issuperset(TURN_MARKS):
            raise UserError(
                f"chat template: {self.tokenizer.folder} has no {TEMPLATE_FILE} and no chat_template in "
                f"{CONFIG_FILE}, and its tokenizer has no {' and '.join(TURN_MARKS)} for the plain form; add a "
                f"{TEMPLATE_FILE}"
            )
        return NEMOTRON.read_text(encoding="utf-8") if special.issuperset(THOUGHT) else CHAT_ML


_MARK = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")


def _without_none(message: Mapping[str, Any]) -> Message:
    return {key: value for key, value in message.items() if value is not None}


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
