"""A conversation with a model: the turns so far, what the template is told, and replies shown as they come."""

import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from app.inspection.terminal import Paper
from app.options import read_bytes, write_text
from datamodules.conversations.replies import END_THINK, THINK, read_reply, thinks
from datamodules.conversations.template import ChatTemplate
from datamodules.tokenizer import Tokenizer
from modules.batch import Message
from modules.checkpoints.source import ModelFolder
from modules.errors import UserError
from modules.generation.session import Session

MARK_TOKENS = 8
"""Tokens at the end of a prompt that hold the mark of an open thought."""


def template_variables(
    source: ModelFolder, thinking: bool | None, low_effort: bool, thinking_budget: int | None
) -> dict[str, Any]:
    """Return what a chat template is told of how to think, by the names that Nemotron's templates have for it.

    Args:
        source: the MODEL.
        thinking: whether to think; None: as in the evaluations of the run that made the MODEL, else the template says.
        low_effort: whether to think little.
        thinking_budget: tokens to think for, as the template tells the model; None: no word of it.

    Raises:
        UserError: the budget is negative, or there is one for no thoughts.
    """
    if thinking is None:
        thinking = (source.facts.get("run", {}).get("environments") or {}).get("thinking")
    if thinking_budget is not None and thinking_budget < 0:
        raise UserError(f"--thinking_budget: {thinking_budget} must not be negative")
    for name, given in (("low_effort", low_effort), ("thinking_budget", thinking_budget is not None)):
        if given and thinking is False:
            raise UserError(f"--{name}: there are no thoughts with --thinking false; give --thinking true")
    variables = {"enable_thinking": thinking, "low_effort": low_effort or None, "reasoning_budget": thinking_budget}
    return {name: value for name, value in variables.items() if value is not None}


def read_tools(file: Path | None) -> list[dict[str, Any]]:
    """Read a JSON list of tools in OpenAI's form, with or without `function` around each; None: no tools.

    Raises:
        UserError: the file holds something else.
    """
    if file is None:
        return []
    try:
        tools = json.loads(read_bytes(file))
    except ValueError as error:
        raise UserError(f"--tools: {file} is not valid JSON ({error})") from None
    form = '[{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}]'
    if not isinstance(tools, list) or not all(map(_is_tool, tools)):
        raise UserError(f"--tools: {file} is no list of tools like {form}")
    return tools


def _is_tool(tool: object) -> bool:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


class Turn(NamedTuple):
    """An assistant's turn that the model is to write."""

    thinking: bool
    """Whether the prompt has opened a thought."""
    tools: Sequence[dict[str, Any]]
    """Tools that it may call."""

    @classmethod
    def after(cls, prompt: list[int], tokenizer: Tokenizer, tools: Sequence[dict[str, Any]]) -> "Turn":
        """Return the turn that the tokens of a prompt leave open."""
        return cls(thinks(tokenizer.decode(prompt[-MARK_TOKENS:])), tools)

    def read(self, text: str) -> Message:
        """Return what the model wrote as a message."""
        return read_reply(text, self.thinking, self.tools)


def show_call(call: dict[str, Any]) -> str:
    """Return a call in a line, like a line of Python."""
    function = call["function"]
    arguments = ", ".join(f"{key}={value!r}" for key, value in function["arguments"].items())
    return f"{function['name']}({arguments})"


class Conversation:
    """The turns so far, and the session that answers.

    Args:
        session: the model's side.
        template: renders the turns.
        tokenizer: the model's tokenizer.
        variables: what else the template is told.
        tools: that the model may call, in OpenAI's form.
        system: system message, if any.
    """

    def __init__(
        self,
        session: Session,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        variables: dict[str, Any],
        tools: Sequence[dict[str, Any]],
        system: str | None,
    ) -> None:
        self._session, self._template, self._tokenizer = session, template, tokenizer
        self._variables, self._tools = variables, list(tools)
        self.reset(system)

    def reset(self, system: str | None) -> None:
        """Forget all turns; go on with this system message, or without one."""
        self.system = system
        self._messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self.calls: list[dict[str, Any]] = []
        """Calls of the newest reply whose results are still to come."""
        self._rendered, self._written = list[int](), list[int]()

    def say(self, text: str, max_new_tokens: int) -> None:
        """Take what the user types: the result of the next call, or else a turn; print the reply as it comes.

        A reply is remembered as far as it came. Calls of one reply are answered one by one.
        """
        if self.calls:
            self.calls.pop(0)
            self._messages.append({"role": "tool", "content": text})
        else:
            self._messages.append({"role": "user", "content": text})
        if not self.calls:
            self._answer(max_new_tokens)

    def _answer(self, max_new_tokens: int) -> None:
        rendered = self._render([])
        tokens = self._as_written(rendered)
        lasting = max(1, len(tokens) - self._passing(rendered))
        turn = Turn.after(tokens, self._tokenizer, self._tools)
        writer = ReplyWriter(turn.thinking, Paper.of_stdout().colour)
        with interruptible() as interrupted:
            for piece in self._session.reply(tokens, max_new_tokens, lasting):
                writer.write(piece)
                if interrupted:
                    break
        writer.finish(" [stopped]\n" if interrupted else "\n")
        text = self._session.text
        message = turn.read(text)
        self._messages.append(message)
        self.calls = list(message.get("tool_calls", [])) if self._tools else []
        self._rendered = rendered + self._tokenizer.encode(text, special_tokens=True)
        self._written = self._session.tokens

    def _render(self, further: list[Message]) -> list[int]:
        return self._template.encode_prompt([*self._messages, *further], self._tools or None, **self._variables)

    def _as_written(self, rendered: list[int]) -> list[int]:
        """Return a rendered conversation with the newest reply in the tokens it was written in, if it is still there.

        A tokenizer would often write it in others, which the cache does not hold. A template may have changed it, too.
        """
        known = len(self._rendered)
        return self._written + rendered[known:] if rendered[:known] == self._rendered else rendered

    def _passing(self, rendered: list[int]) -> int:
        """Return how many tokens at the end of a prompt will be others once there is a reply and a further turn."""
        reply: Message = {"role": "assistant", "content": "a", "reasoning_content": "a"}
        later = self._render([reply, {"role": "user", "content": "a"}])
        same = next((n for n, pair in enumerate(zip(rendered, later, strict=False)) if pair[0] != pair[1]), None)
        return 0 if same is None else len(rendered) - same


class ReplyWriter:
    """Writes a reply as it comes, thoughts dimmed on a terminal with colours; their marks are text everywhere.

    Args:
        thinking: whether the prompt has opened a thought.
        colour: whether stdout is a terminal that understands colours, and they are wanted.
    """

    def __init__(self, thinking: bool, colour: bool) -> None:
        self._colour = colour
        self._thinking, self._held = False, f"{THINK}\n" if thinking else ""

    def write(self, piece: str) -> None:
        """Write a piece, but for an end that may be the beginning of a mark."""
        self._held += piece
        while True:
            before, mark, rest = self._held.partition(END_THINK if self._thinking else THINK)
            if not mark:
                break
            self._emit(before + mark if self._thinking else before)
            self._thinking, self._held = not self._thinking, rest if self._thinking else mark + rest
        mark = END_THINK if self._thinking else THINK
        held = next((n for n in range(len(mark) - 1, 0, -1) if self._held.endswith(mark[:n])), 0)
        self._emit(self._held[: len(self._held) - held])
        self._held = self._held[len(self._held) - held :]

    def finish(self, end: str) -> None:
        """Write what was held back, and the end of the line."""
        self._emit(self._held)
        write_text(end)

    def _emit(self, text: str) -> None:
        if text:
            write_text(text, dimmed=self._thinking and self._colour)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Let the first Ctrl-C only fill the list that is given; the second one interrupts."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
