"""What a model wrote, as a message: its thoughts, what it says and the calls it makes told apart.

It is the other direction of a chat template, in the forms of Nemotron's: thoughts end with `</think>`, and the
generation prompt may have begun them; calls stand at the end, in XML. What is not complete stays text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from modules.batch import Message

THINK, END_THINK = "<think>", "</think>"
_CALL = re.compile(r"<tool_call>\s*<function=([^>\n]+)>\n?(.*?)</function>\s*</tool_call>\s*", re.DOTALL)
_ARGUMENT = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


def thinks(prompt: str) -> bool:
    """Return whether a generation prompt leaves a thought open, so that the reply goes on with it."""
    return prompt.rstrip().endswith(THINK)


def read_reply(text: str, thinking: bool, tools: Sequence[Mapping[str, Any]] = ()) -> Message:
    """Return the assistant's turn that a text is.

    Args:
        text: what the model wrote behind the generation prompt, without the token that ended it.
        thinking: whether the generation prompt had opened a thought (`thinks`); one that the text never closes is all
            there is.
        tools: in OpenAI's form, with or without `function` around them; their schemas say which arguments are texts.

    Returns:
        `role`, `content` and, where the text has them, `reasoning_content` and `tool_calls` (`type`, `function` with
        `name` and `arguments`, a mapping). A chat template that gets it back renders what was written, but for
        blanks at the ends.
    """
    thoughts, end, said = text.rpartition(END_THINK)
    if not end and (thinking or said.lstrip().startswith(THINK)):
        thoughts, said = said, ""
    message: Message = {"role": "assistant", "content": said.removeprefix("\n") if end else said}
    if thoughts := thoughts.removeprefix(THINK).strip("\n"):
        message["reasoning_content"] = thoughts
    start = message["content"].find("<tool_call>")
    found = None if start < 0 else _row(_CALL, message["content"], start)
    calls = [_call(name, body, tools) for name, body in found or []]
    if calls and all(calls):
        message |= {"content": message["content"][:start].removesuffix("\n"), "tool_calls": calls}
    return message


def _row(pattern: re.Pattern[str], text: str, start: int = 0) -> list[tuple[str, str]] | None:
    """Return the groups of matches that stand one behind the other; None if the text has anything else from `start`.

    A repeated pattern would say the same, but tries every way to divide what does not match: hours for a model that
    repeats itself.
    """
    found = []
    while start < len(text):
        match = pattern.match(text, start)
        if match is None:
            return None
        found.append((match[1], match[2]))
        start = match.end()
    return found


def _call(name: str, body: str, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return a call; None if there is more in it than arguments."""
    found, kinds = _row(_ARGUMENT, body), _kinds(name, tools)
    if found is None:
        return None
    arguments = {key: _value(text, kinds.get(key)) for key, text in found}
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _kinds(name: str, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the JSON type of each argument of a tool, as far as its schema, which may be anything, says."""
    functions = [tool.get("function", tool) for tool in tools]
    schema = next((one.get("parameters") for one in functions if one.get("name") == name), None)
    fields = schema.get("properties") if isinstance(schema, Mapping) else None
    if not isinstance(fields, Mapping):
        return {}
    return {key: field.get("type") for key, field in fields.items() if isinstance(field, Mapping)}


def _value(text: str, kind: object) -> Any:
    """Return the value of an argument: JSON where the tool asks for more than a text and the text is JSON."""
    if kind is None or "string" in (kind if isinstance(kind, list) else [kind]):
        return text
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except ValueError:
        return text
