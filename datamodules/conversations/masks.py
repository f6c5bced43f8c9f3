r"""Which tokens of a conversation are learnt: read off the template's marks or off renderings, never searched in text.

`mask: template` takes what the template marks ({% generation %}) as it stands, token for token as transformers'
`return_assistant_tokens_mask`: that includes what a generation prompt would supply and the line break behind a turn.
`mask: generated` takes what a model has to write when it is asked to go on: not what the generation prompt supplies,
nor what follows the token that ends the turn. The generation prompt of a turn is the longest of the template's
(thinking on, off, unsaid) that the turn begins with. `<think>\n` is thus not learnt where thoughts follow, nor an
empty thought `<think></think>` where none do, whoever put it there.

Turns before the last user's, whose thoughts the template dropped, begin with an empty thought, which is not learnt; the
answer behind it is. It stands exactly where it would if the turn were generated with thinking off: earlier thoughts
dropped, then the generation prompt of that mode. Thoughts that are not in the rendered text teach nothing; to learn
them all, give a conversation once up to each user turn.

A turn that begins with no generation prompt (`<think>a` where the prompt has a line break behind the tag) is learnt
from where it parts from the prompts. A token that holds both, supplied and written text, is not learnt: a model never
writes it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from datamodules.conversations.control import THOUGHT, Block, common_length
from datamodules.conversations.messages import Conversation, ConversationError
from datamodules.conversations.template import ChatTemplate, Rendering
from modules.batch import Message

Mask = Literal["generated", "template"]
Span = tuple[int, int]
LAST_USER_ONLY = ("low_effort", "reasoning_budget", "medium_effort")
"""Variables that change nothing but the last user's turn."""
EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>")


@dataclass(frozen=True)
class Encoded:
    """A conversation as the network sees it."""

    tokens: np.ndarray
    """int32 [n]: token ids."""
    mask: np.ndarray
    """bool [n]: whether a token is learnt, as the target of the position before it."""


def encode(conversation: Conversation, template: ChatTemplate, mask: Mask = "generated") -> Encoded:
    """Return the tokens of a conversation and which of them are learnt.

    Args:
        conversation: the conversation.
        template: the model's template.
        mask: what is learnt, see the module.

    Returns:
        tokens int32 [n], mask bool [n].

    Raises:
        ConversationError: the template refuses the conversation; what the assistant says cannot be told exactly; or the
            mask is empty, whole, reaches into another turn, lacks the end of a turn or holds an inserted empty thought.
    """
    try:
        return _encode(conversation, template, mask)
    except ConversationError as error:
        raise error.at(conversation.place) from error.__cause__


def _encode(conversation: Conversation, template: ChatTemplate, mask: Mask) -> Encoded:
    block = template.block(conversation.messages, conversation.tools)
    whole = _render(conversation, template, block, conversation.messages)
    encoding = block.encode(whole.text)
    end = _end_of_turns(template)
    if template.has_marks:
        given = conversation.messages[: conversation.prompt_turns]
        spans = whole.marked[len(_render(conversation, template, block, given).marked) if given else 0 :]
    else:
        spans = _compared(conversation, template, whole, block.name(end))
    learnt = np.zeros(len(encoding.ids), dtype=np.bool_)
    for span in spans:
        first, last = span if mask == "template" else _written(span, template, whole, block.name(end))
        if first < last:
            start, stop = encoding.char_to_token(first), encoding.char_to_token(last - 1)
            assert start is not None
            assert stop is not None
            learnt[start + (mask == "generated" and encoding.offsets[start][0] < first) : stop + 1] = True
        if mask == "generated":
            _check_thought(conversation, block, whole.text[first:last])
    tokens = np.array(encoding.ids, dtype=np.int32)
    check_mask(tokens, learnt, block.ids[end], [whole.text[slice(*place)] for place in encoding.offsets])
    return Encoded(tokens, learnt)


def _render(
    conversation: Conversation,
    template: ChatTemplate,
    block: Block,
    messages: Sequence[Message],
    without: Sequence[str] = (),
) -> Rendering:
    """Return turns rendered as the conversation is, but for some variables."""
    variables = {key: value for key, value in conversation.variables.items() if key not in without}
    return template.trace(messages, block, answer=False, tools=conversation.tools, **variables)


def _end_of_turns(template: ChatTemplate) -> str:
    """Return the name of the token that ends an assistant's turn."""
    end = template.turn_end()
    if end is None:
        raise ConversationError("no end of turns", "the chat template ends an assistant's turn by no control token")
    return template.name_of(end)


def _written(span: Span, template: ChatTemplate, whole: Rendering, end: str) -> Span:
    """Return what of an assistant's turn the model writes: all but the generation prompt, up to the end token."""
    (start, stop), text = span, whole.text
    first = start
    for prompt in template.generation_prompts(whole.block):
        known = next(size for size in range(len(prompt), -1, -1) if text.endswith(prompt[:size], 0, start))
        supplied = prompt[known:]
        if text.startswith(supplied, start):
            first = start + len(supplied)
            break
        first = max(first, start + whole.block.shared(supplied, text[start:stop]))
    at = text.find(end, first, stop)
    if at >= 0:
        return first, at + len(end)
    return first, stop + len(end) if text.startswith(end, stop) else stop


def _compared(conversation: Conversation, template: ChatTemplate, whole: Rendering, end: str) -> list[Span]:
    """Return what the assistant says where a template marks nothing.

    That is from behind the header of each of its turns to the end token and the blanks behind it.
    """
    prompts = template.generation_prompts(whole.block)
    header = prompts[0][: min(whole.block.shared(prompts[0], prompt) for prompt in prompts)] if prompts else ""
    header = header.split(whole.block.tag(THOUGHT[0]))[0]
    spans = []
    for number, message in enumerate(conversation.messages):
        if message["role"] == "assistant" and number >= conversation.prompt_turns:
            start = _turn_start(conversation, template, whole, header, number) + len(header)
            at = whole.text.find(end, start)
            if at < 0 or at >= _content_start(conversation, template, whole, number + 1):
                raise _untold(number, "its end")
            blanks = re.compile(r"\s*").match(whole.text, at + len(end))
            assert blanks is not None
            spans.append((start, blanks.end()))
    return spans


def _turn_start(conversation: Conversation, template: ChatTemplate, whole: Rendering, header: str, number: int) -> int:
    """Return where an assistant's turn begins in the whole rendering.

    That is where the rendering of the turns before it ends; or, where that is no beginning of the whole (later turns
    change earlier ones: thoughts are dropped), at the last header before the place where another content of this turn
    makes another text. Headers of control tokens cannot stand in what anybody says.
    """
    messages = conversation.messages
    last = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=-1)
    before, left_out = messages[:number], LAST_USER_ONLY if number < last else ()
    try:
        text = _render(conversation, template, whole.block, before, left_out).text
        if whole.text.startswith(text + header):
            return len(text)
    except ConversationError:  # a template may refuse a part of a conversation
        pass
    start = whole.text.rfind(header, 0, _content_start(conversation, template, whole, number))
    if start < 0 or not whole.block.holds_control(header):
        raise _untold(number, "its beginning")
    return start


def _content_start(conversation: Conversation, template: ChatTemplate, whole: Rendering, number: int) -> int:
    """Return a place in a turn's content, as early as can be told: where a rendering with another content parts.

    Of the turn behind the last one: where the text ends.
    """
    messages = list(conversation.messages)
    if number == len(messages):
        return len(whole.text)
    message = messages[number]
    messages[number] = {**message, "content": "b" if message["content"].lstrip().startswith("a") else "a"}
    return common_length(whole.text, _render(conversation, template, whole.block, messages).text)


def _untold(number: int, what: str) -> ConversationError:
    reason = (
        f"the chat template marks nothing, and comparing renderings does not tell {what} of turn {number + 1}; "
        "put {% generation %} and {% endgeneration %} around what the assistant says in the template"
    )
    return ConversationError("mask that cannot be told", reason)


def _check_thought(conversation: Conversation, block: Block, written: str) -> None:
    """Check that an empty thought to be learnt is one that the conversation holds."""
    opening, closing = (block.tag(tag) for tag in THOUGHT)
    given = (message["content"] for message in conversation.messages if message["role"] == "assistant")
    if re.match(rf"{opening}\s*{closing}", written) and not any(EMPTY_THOUGHT.match(content) for content in given):
        raise ConversationError("mask with an inserted thought", "the mask holds an empty thought that no turn has")


def check_mask(tokens: np.ndarray, learnt: np.ndarray, end: int, texts: Sequence[str]) -> None:
    """Check that a mask is one that can be learnt from.

    Args:
        tokens: int [n], of one conversation.
        learnt: bool [n], whether a token is learnt; the first of all cannot be.
        end: token that ends a turn.
        texts: of each token; only blanks may be learnt behind the end of a turn.

    Raises:
        ConversationError: the mask is empty, whole, lacks the end of a turn or goes beyond it.
    """
    if not learnt.any():
        raise ConversationError("empty mask", "the mask is empty: nothing would be learnt")
    if learnt[1:].all():
        raise ConversationError("whole mask", "the mask is whole: prompts would be learnt too")
    ends = np.flatnonzero(tokens == end)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], learnt, [False]])))
    for first, stop in edges.reshape(-1, 2):
        own_ends = ends[ends >= first]
        if not len(own_ends) or not learnt[own_ends[0]]:
            raise ConversationError("mask without end", f"the mask lacks the token that ends the turn at token {first}")
        if "".join(texts[own_ends[0] + 1 : stop]).strip():
            raise ConversationError(
                "mask across a border", f"the mask of the turn at token {first} goes beyond its end"
            )
