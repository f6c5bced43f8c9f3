"""Messages and tools of a chat request, checked and as a chat template takes them."""

import json
from typing import Any

from app.serving.errors import shown
from modules.batch import Message

ROLES = ("system", "user", "assistant", "tool")
MOST_TOOLS = 128
"""OpenAI's limit."""
_KEYS = {
    "system": {"role", "content", "name"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", "reasoning_content", "tool_calls", "refusal", "annotations", "audio"},
    "tool": {"role", "content", "name", "tool_call_id"},
}
"""What a message may hold. `refusal`, `annotations` and `audio` stand in what OpenAI's client gives back."""


def messages(value: Any) -> list[Message]:
    """Check `messages`.

    Returns:
        The turns: contents as texts, arguments of calls as objects; `developer` is called system.

    Raises:
        ValueError: what is wrong with which of them.
    """
    if type(value) is not list or not value:
        raise ValueError(f"must be a list of at least one message, not {shown(value)}")
    return [_message(message, f"number {place}") for place, message in enumerate(value)]


def tools(value: Any) -> list[dict[str, Any]]:
    """Check `tools`: functions in OpenAI's form.

    Raises:
        ValueError: what is wrong with which of them.
    """
    if type(value) is not list or len(value) > MOST_TOOLS:
        raise ValueError(f"must be a list of at most {MOST_TOOLS} tools, not {shown(value)}")
    for place, tool in enumerate(value):
        function = tool.get("function") if type(tool) is dict else None
        if type(function) is not dict or tool.get("type") != "function" or not _filled(function.get("name")):
            form = '{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}'
            raise ValueError(f"number {place} must be of the form {form}, not {shown(tool)}")
        if type(function.get("description", "")) not in (str, type(None)):
            raise ValueError(f"number {place}: description must be a text")
        parameters = function.get("parameters") or {}
        properties = parameters.get("properties", {}) if type(parameters) is dict else None
        if type(properties) is not dict or not all(type(field) is dict for field in properties.values()):
            raise ValueError(f"number {place}: parameters must be a JSON schema of an object")
    return value


def _filled(value: Any) -> bool:
    return type(value) is str and value != ""


def _message(message: Any, where: str) -> Message:
    if type(message) is not dict:
        raise ValueError(f"{where} must be an object with role and content, not {shown(message)}")
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}: role must be one of {', '.join(ROLES)}, not {shown(message.get('role'))}")
    if unknown := message.keys() - _KEYS[role]:
        raise ValueError(f"{where}: {shown(min(unknown))} is nothing that a message of the {role} has")
    turn: Message = {"role": role, "content": _content(message, where)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if message.get(name) is not None:
            if type(message[name]) is not str:
                raise ValueError(f"{where}: {name} must be a text, not {shown(message[name])}")
            turn[name] = message[name]
    if message.get("tool_calls") not in (None, []):
        if type(message["tool_calls"]) is not list:
            raise ValueError(f"{where}: tool_calls must be a list, not {shown(message['tool_calls'])}")
        turn["tool_calls"] = [_call(call, where) for call in message["tool_calls"]]
    elif message.get("content") is None:
        raise ValueError(f"{where}: content is missing")
    return turn


def _content(message: dict[str, Any], where: str) -> str:
    """Return the content of a message; parts of text are one text."""
    content = message.get("content")
    if content is None:
        return ""
    parts = [{"type": "text", "text": content}] if type(content) is str else content
    if type(parts) is not list:
        raise ValueError(f"{where}: content must be a text or a list of parts, not {shown(content)}")
    for part in parts:
        if type(part) is not dict or part.get("type") != "text" or type(part.get("text")) is not str:
            raise ValueError(f'{where}: a part of content must be {{"type": "text", "text": ...}}, not {shown(part)}')
    return "".join(part["text"] for part in parts)


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if type(call) is dict else None
    if type(function) is not dict or not _filled(function.get("name")):
        form = '{"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}'
        raise ValueError(f"{where}: a call must be of the form {form}, not {shown(call)}")
    arguments = function.get("arguments", "{}")
    if type(arguments) is str:
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: arguments of a call are not valid JSON: {error}") from error
    if type(arguments) is not dict:
        raise ValueError(f"{where}: arguments of a call must be a JSON object, not {shown(arguments)}")
    known = {"id": call["id"]} if type(call.get("id")) is str else {}
    return {**known, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
