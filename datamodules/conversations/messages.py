"""Conversations as files write them, read into one form: turns, tools, weight.

Three forms are read: `messages` (OpenAI, Hugging Face), `prompt` + `completion` (trl) and `conversations` (ShareGPT).
Whatever a row gets wrong has a kind, by which such rows are counted, and a reason, which names what to mend.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from modules.batch import Message
from modules.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""Who speaks in ShareGPT's form, by its `from`."""
CALLS = ("function_call", "tool_call")
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of an assistant's thoughts, as transformers reads them: the first counts."""
NO_VARIABLES = frozenset(
    ("messages", "tools", "conversations", "chat_template", "add_generation_prompt", "answer", "block", "self")
)
"""What a chat template is told by the conversation, or by us; `chat_template_kwargs` cannot say it again."""
MOST_WEIGHT = 1e30
"""Weights from 1 / this to this: float32 holds them and the sums of as many as anybody has."""


class ConversationError(UserError):
    """A conversation that cannot be used.

    Args:
        kind: what is wrong, in two or three words: such conversations are counted by it.
        reason: what is wrong with this one.
        place: where it stands (FILE:LINE), if that is known.
    """

    def __init__(self, kind: str, reason: str, place: str | None = None) -> None:
        super().__init__(f"{place}: {reason}" if place else reason)
        self.kind, self.reason, self.place = kind, reason, place

    def at(self, place: str) -> "ConversationError":
        """Return the error with the place where the conversation stands."""
        return ConversationError(self.kind, self.reason, place)


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns and what else a chat template is told."""

    messages: list[Message]
    """The turns: `role`, `content` (str) and, of an assistant, `reasoning_content` (str) and `tool_calls` (arguments
    are an object)."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    """Tools in OpenAI's form."""
    weight: float = 1.0
    """Weight of the conversation in the loss, above 0."""
    variables: dict[str, Any] = field(default_factory=dict)
    """What the template is told beyond messages and tools: `enable_thinking`, ..."""
    prompt_turns: int = 0
    """Turns at the beginning that are given: what an assistant says in them is not learnt."""
    place: str = "the conversation"
    """Where it stands (FILE:LINE), for messages."""


def read_line(line: str, place: str) -> Conversation:
    """Read a line of a JSONL file.

    Raises:
        ConversationError: as `read_conversation`, or the line is no JSON.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConversationError("broken line", f"the line is no JSON ({error}); mend or remove it", place) from None
    return read_conversation(row, place)


def read_conversation(row: object, place: str) -> Conversation:
    """Read a row that holds a conversation.

    Args:
        row: an object with `messages`, or `prompt` and `completion` (texts or lists of turns), or `conversations`; and
            perhaps `tools` (a list, or a text that is one in JSON), `weight`, `chat_template_kwargs` (an object).
        place: where it stands (FILE:LINE).

    Raises:
        ConversationError: it holds none, or a malformed one.
    """
    try:
        return _read(row, place)
    except ConversationError as error:
        raise error.at(place) from None


def read_messages(turns: object, *, for_training: bool = False) -> list[Message]:
    """Check turns and bring them into one form.

    Contents become one text, an assistant's thoughts `reasoning_content`, arguments of calls objects; keys without a
    value are left out.

    Args:
        turns: a list of objects with `role` and `content`.
        for_training: whether an assistant must speak.

    Raises:
        ConversationError: they are malformed.
    """
    if not isinstance(turns, list):
        raise ConversationError(
            "wrong type", f'messages must be a list of turns like {{"role": ..., "content": ...}}, not {_type(turns)}'
        )
    if not turns:
        raise ConversationError("empty conversation", "messages must hold at least one turn")
    messages = [_read_turn(turn, f"turn {number}") for number, turn in enumerate(turns, 1)]
    if sum(message["role"] == "system" for message in messages) > 1:
        raise ConversationError("two system turns", "the conversation has more than one system turn; join them")
    _check_calls(messages)
    if for_training and all(message["role"] != "assistant" for message in messages):
        raise ConversationError("no assistant turn", "no turn is the assistant's: nothing would be learnt")
    return messages


def read_tools(tools: object) -> list[dict[str, Any]]:
    """Check definitions of tools: a list, a text that is one in JSON, or nothing.

    Raises:
        ConversationError: they are malformed.
    """
    if isinstance(tools, str) and tools.strip():
        tools = _from_json(tools, "tools")
    if not tools:
        return []
    if not isinstance(tools, list):
        raise ConversationError("wrong type", f"tools must be a list of definitions, not {_type(tools)}")
    for number, tool in enumerate(tools, 1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ConversationError("wrong type", f"tool {number} must be an object with a name")
    return tools


def _read(row: object, place: str) -> Conversation:
    if not isinstance(row, dict):
        raise ConversationError("wrong type", f"a row must be an object, not {_type(row)}")
    turns, prompt_turns = _turns(row)
    weight = 1.0 if row.get("weight") is None else row["weight"]
    if type(weight) not in (int, float) or not 1 / MOST_WEIGHT <= weight <= MOST_WEIGHT:
        given = f"{weight!r}"
        raise ConversationError("wrong type", f"weight must be a number above 0, up to {MOST_WEIGHT}, not {given:.40}")
    variables = row.get("chat_template_kwargs") or {}
    if not isinstance(variables, dict):
        raise ConversationError("wrong type", f"chat_template_kwargs must be an object, not {_type(variables)}")
    for name in NO_VARIABLES.intersection(variables):
        raise ConversationError("wrong type", f"chat_template_kwargs: {name} is no variable to set; take it out")
    messages = read_messages(turns, for_training=True)
    if all(message["role"] != "assistant" for message in messages[prompt_turns:]):
        raise ConversationError("no assistant turn", "the completion has no assistant's turn: nothing would be learnt")
    return Conversation(
        messages=messages,
        tools=read_tools(row.get("tools")),
        weight=float(weight),
        variables={key: value for key, value in variables.items() if value is not None},
        prompt_turns=prompt_turns,
        place=place,
    )


def _turns(row: dict[str, Any]) -> tuple[object, int]:
    """Return the turns of a row in OpenAI's form, unchecked, and how many of them are a prompt."""
    if row.get("messages") is not None:
        return row["messages"], 0
    if row.get("prompt") is not None or row.get("completion") is not None:
        prompt, completion = (_half(row, key, role) for key, role in (("prompt", "user"), ("completion", "assistant")))
        return prompt + completion, len(prompt)
    if row.get("conversations") is not None:
        return _sharegpt(row), 0
    keys = ", ".join(map(str, row)) or "no key"
    raise ConversationError(
        "no conversation", f"a row needs messages, or prompt and completion, or conversations; this one has {keys}"
    )


def _half(row: dict[str, Any], key: str, role: str) -> list[Any]:
    value = row.get(key)
    if value is None:
        raise ConversationError("missing content", f"prompt and completion go together; {key} is missing")
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise ConversationError("wrong type", f"{key} must be a text or a list of turns, not {_type(value)}")
    return value


def _sharegpt(row: dict[str, Any]) -> object:
    if not isinstance(row["conversations"], list):
        return row["conversations"]
    turns: list[Any] = []
    if isinstance(row.get("system"), str) and row["system"]:
        turns.append({"role": "system", "content": row["system"]})
    for number, turn in enumerate(row["conversations"], 1):
        if not isinstance(turn, dict) or "from" not in turn:
            turns.append(turn)  # some files mix the two forms
            continue
        speaker, value = turn["from"], turn.get("value")
        role = SHAREGPT_ROLES.get(speaker, str(speaker)) if isinstance(speaker, str) else speaker
        if speaker in CALLS and isinstance(value, str):
            calls = _from_json(value, f"the {speaker} of turn {number}")
            calls = calls if isinstance(calls, list) else [calls]
            turns.append({"role": role, "content": "", "tool_calls": calls})
        else:
            turns.append({"role": role, "content": value})
    return turns


def _read_turn(turn: object, name: str) -> Message:
    if not isinstance(turn, dict):
        raise ConversationError("wrong type", f"{name} must be an object with role and content, not {_type(turn)}")
    role = turn.get("role")
    if role not in ROLES:
        raise ConversationError("unknown role", f"{name} has the unknown role {role!r}; known are {', '.join(ROLES)}")
    message: Message = {key: value for key, value in turn.items() if value is not None and key not in REASONING}
    thoughts = next((turn[key] for key in REASONING if turn.get(key) is not None), None)
    if thoughts is not None:
        if not isinstance(thoughts, str):
            raise ConversationError("wrong type", f"{name}: reasoning_content must be a text, not {_type(thoughts)}")
        message["reasoning_content"] = thoughts
    if message.get("tool_calls") is not None:
        if role != "assistant" and message["tool_calls"]:  # tables give every turn a list
            raise ConversationError("wrong type", f"{name}: only an assistant's turn may have tool_calls")
        message["tool_calls"] = _read_calls(message["tool_calls"], name)
    if "content" in message:
        message["content"] = _text(message["content"], name)
    elif role != "assistant" or not (message.get("tool_calls") or thoughts):
        raise ConversationError("missing content", f"{name} ({role}) has no content")
    else:
        message["content"] = ""
    return message


def _text(content: object, name: str) -> str:
    """Return the text of a content: a text, or a list of its parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        parts = [part.get("text") for part in texts] if len(texts) == len(content) else [None]
        if all(isinstance(part, str) for part in parts):
            return "".join(part for part in parts if part)
        raise ConversationError("wrong type", f"{name}: only parts of the type text can be read")
    raise ConversationError("wrong type", f"{name}: content must be a text, not {_type(content)}")


def _read_calls(calls: object, name: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise ConversationError("wrong type", f"{name}: tool_calls must be a list, not {_type(calls)}")
    read = []
    for number, call in enumerate(calls, 1):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ConversationError("wrong type", f"{name}: call {number} must be an object with a function's name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _from_json(arguments, f"{name}: arguments of call {number}") if arguments.strip() else {}
        if not isinstance(arguments, dict | None):
            raise ConversationError("wrong type", f"{name}: arguments of call {number} must be an object")
        identity = {"id": call["id"]} if call.get("id") is not None else {}
        function = {"name": function["name"], "arguments": arguments or {}}
        read.append({**identity, "type": "function", "function": function})
    return read


def _check_calls(messages: Sequence[Message]) -> None:
    """Check that calls and results fit: as many results as calls, right behind them, with their ids where they have.

    Calls in the last turn wait for their results outside the conversation: that is what a model learns to write.
    """
    waiting: list[Message] = []
    for number, message in enumerate(messages, 1):
        if message["role"] == "tool":
            names = [call.get("id") for call in waiting]
            name = message.get("tool_call_id")
            at = names.index(name) if name in names else 0
            if not waiting or (name is not None and names[at] not in (None, name)):
                raise ConversationError("result without call", f"turn {number} is a result of no call")
            waiting.pop(at)
            continue
        if waiting:
            raise _missing_result(waiting, number)
        waiting = list(message.get("tool_calls", []))
    if waiting and messages[-1]["role"] == "tool":
        raise _missing_result(waiting, len(messages) + 1)


def _missing_result(waiting: Sequence[Message], number: int) -> ConversationError:
    name = waiting[0]["function"]["name"]
    return ConversationError("call without result", f"before turn {number} the result of a call of {name} is missing")


def _from_json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConversationError("wrong type", f"{name}: it is no JSON ({error})") from None


def _type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
