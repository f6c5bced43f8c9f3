"""What is made of a conversation beyond rendering it: reasoning modes, budgets of thought, lengths.

Every choice is a pure function of a seed and the conversation's number, so that it does not depend on the order, or on
the processes, in which conversations are prepared.
"""

import random
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from datamodules.conversations.control import THOUGHT
from datamodules.conversations.masks import Encoded
from datamodules.conversations.messages import Conversation
from datamodules.conversations.template import ChatTemplate
from modules.batch import Message

OverLong = Literal["drop", "turn", "cut"]
Mode = Literal["thinking_off", "low_effort", "truncated_thoughts"]
TOLD = ("enable_thinking", "low_effort", "reasoning_budget")
"""Variables by which a conversation has a mode of its own, which is left to it."""


@dataclass(frozen=True, kw_only=True)
class ReasoningModes:
    """Shares of the conversations with thoughts that are shown in another mode; the defaults are Nemotron 3 Super's."""

    thinking_off: float = 0.03
    """Thoughts left out, thinking off."""
    low_effort: float = 0.02
    """The user asks for low effort."""
    truncated_thoughts: float = 0.12
    """Thoughts end at a random number of tokens, which the user states as the budget."""

    def __post_init__(self) -> None:
        shares = (self.thinking_off, self.low_effort, self.truncated_thoughts)
        assert min(shares) >= 0, "shares must not be negative"
        assert sum(shares) <= 1, "shares must not be more than all"

    def draw(self, seed: int, number: int) -> Mode | None:
        """Return the mode of a conversation, None for the usual one."""
        drawn = _random("mode", seed, number).random()
        for mode in get_args(Mode):
            share = getattr(self, mode)
            if drawn < share:
                return mode
            drawn -= share
        return None


def in_mode(conversation: Conversation, mode: Mode, template: ChatTemplate, seed: int, number: int) -> Conversation:
    """Return a conversation in a reasoning mode.

    One without thoughts that the model would see (by most templates, behind the last user's turn), or with a mode of
    its own, is returned as it is: the same object.

    Args:
        conversation: the conversation.
        mode: thinking_off leaves all thoughts out; low_effort has the user ask for it; truncated_thoughts ends the
            thoughts behind the last user's turn, taken together, at a random number of tokens, the budget that the user
            states.
        template: tells tokens.
        seed: seed of the draws.
        number: number of the conversation.
    """
    shown = _shown_thoughts(conversation)
    if not shown or any(name in conversation.variables for name in TOLD):
        return conversation
    if mode == "thinking_off":
        messages = [with_thought(message, None) for message in conversation.messages]
        return replace(conversation, messages=messages, variables={**conversation.variables, "enable_thinking": False})
    if mode == "low_effort":
        return replace(conversation, variables={**conversation.variables, "low_effort": True})
    ends = {turn: _token_ends(text, template) for turn, text in shown.items()}
    total = sum(map(len, ends.values()))
    if total < 2:
        return conversation
    budget = left = _random("budget", seed, number).randint(1, total - 1)
    messages = list(conversation.messages)
    for turn, text in shown.items():
        kept = min(left, len(ends[turn]))
        messages[turn] = with_thought(messages[turn], text[: ends[turn][kept - 1]] if kept else None)
        left -= kept
    return replace(conversation, messages=messages, variables={**conversation.variables, "reasoning_budget": budget})


def shorten(encoded: Encoded, length: int, over_long: OverLong) -> Encoded | None:
    """Return what a policy leaves of a conversation that is longer than a row, None if there is nothing to learn in it.

    Args:
        encoded: the conversation.
        length: tokens at most.
        over_long: drop all of it; end it with the last turn of the assistant that fits (turn); or end it at `length`
            (cut), in the middle of a turn, whose end is then not learnt.
    """
    if len(encoded.tokens) <= length:
        return encoded
    if over_long == "drop":
        return None
    if over_long == "turn":
        ends = np.flatnonzero(encoded.mask[:length] & ~encoded.mask[1 : length + 1]) + 1
        length = int(ends[-1]) if len(ends) else 0
    left = Encoded(encoded.tokens[:length], encoded.mask[:length])
    return left if left.mask.any() else None


def thought_of(message: Message) -> str | None:
    """Return an assistant's thought without blanks around it: `reasoning_content`, or what stands in its content."""
    thought = message.get("reasoning_content", "").strip()
    if not thought and THOUGHT[1] in message["content"]:
        thought = _parts(message["content"])[1].strip()
    return thought or None


def with_thought(message: Message, thought: str | None) -> Message:
    """Return an assistant's turn with another thought, where it had one, or without."""
    old = thought_of(message) if message["role"] == "assistant" else None
    if old is None:
        return message
    if message.get("reasoning_content", "").strip():
        others = {key: value for key, value in message.items() if key != "reasoning_content"}
        return others if thought is None else {**others, "reasoning_content": thought}
    opening, whole, answer = _parts(message["content"])
    content = answer.lstrip() if thought is None else f"{opening}{whole.replace(old, thought)}{THOUGHT[1]}{answer}"
    return {**message, "content": content}


def _parts(content: str) -> tuple[str, str, str]:
    """Return the opening tag and what is before it, if there is one, the thought, and what follows the closing tag."""
    head, _, answer = content.rpartition(THOUGHT[1])
    before, tag, thought = head.partition(THOUGHT[0])
    return (before + tag, thought, answer) if tag else ("", head, answer)


def _shown_thoughts(conversation: Conversation) -> dict[int, str]:
    """Return the thoughts behind the last user's turn, by turn."""
    messages = conversation.messages
    last = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=-1)
    thoughts = {
        turn: thought_of(message)
        for turn, message in enumerate(messages)
        if turn > max(last, conversation.prompt_turns - 1) and message["role"] == "assistant"
    }
    return {turn: thought for turn, thought in thoughts.items() if thought is not None}


def _token_ends(text: str, template: ChatTemplate) -> list[int]:
    """Return where each token of a text ends; where a character takes several, behind the character."""
    return [end for _, end in template.block(text).encode(text).offsets]


def _random(purpose: str, seed: int, number: int) -> random.Random:
    return random.Random(f"{purpose} {seed} {number}")
