"""The fields of a request, and what each may hold.

Types are as JSON has them: no text that looks like a number, no number for true. `null` is a field that is not given.
A field that we do not know is refused by name: a setting that is passed over in silence gives wrong results in silence.
Of OpenAI's fields those that change no result are passed over, and those that we do not have may only say that they are
off.
"""

import json
import math
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from app.serving.errors import RequestError, shown
from datamodules.conversations.messages import NO_VARIABLES, read_messages
from modules.batch import Message

Check = Callable[[Any], Any]
"""Returns what a value means; raises ValueError with what would be right."""

MOST_TOOLS = 128
"""OpenAI's limit."""
MOST_STOPS, LONGEST_STOP = 16, 1024
"""Stop strings of a request, and characters of one."""
IGNORED = ("metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store")
IGNORED += ("user", "verbosity")
"""OpenAI's fields that change no token."""
OFF: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "web_search_options": (),
}
"""OpenAI's fields that are not supported, and the values that ask for nothing."""


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the object that a request's body is.

    Raises:
        RequestError: it is none: not UTF-8, not JSON, NaN or Infinity, half a surrogate pair, nested without end.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError("the body holds half of a surrogate pair, which is no character") from error
    except RecursionError as error:
        raise RequestError("the body is nested too deeply") from error
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON in UTF-8: {error}") from error
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, not {shown(value)}")
    return value


def parse_fields(body: dict[str, Any], checks: Mapping[str, Check], required: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields of a request that are given and not null, checked.

    Args:
        body: the request.
        checks: the fields we know.
        required: those that must be given.

    Raises:
        RequestError: a field is missing, unknown or wrong.
    """
    found: dict[str, Any] = {}
    for name, value in body.items():
        if name not in checks and name not in OFF and name not in IGNORED:
            near = get_close_matches(name, [*checks, *OFF], n=1)
            mend = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(sorted(checks))}"
            raise RequestError(f"unknown field {shown(name)}{mend}", param=name[:80], code="unknown_parameter")
        if value is None:
            continue
        if name in checks:
            try:
                found[name] = checks[name](value)
            except ValueError as error:
                raise RequestError(f"{name}: {error}", param=name) from error
        elif name in OFF and not any(value == off and type(value) is type(off) for off in _alike(OFF[name])):
            what = f"leave it out or at {json.dumps(OFF[name][0])}" if OFF[name] else "leave it out"
            raise RequestError(f"{name} is not supported: {what}", param=name, code="unsupported_parameter")
    for name in required:
        if name not in found:
            raise RequestError(f"{name} is missing", param=name, code="missing_required_parameter")
    return found


def integer(least: int, most: int) -> Check:
    """Return the check of an integer."""

    def check(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"must be an integer from {least} to {most}, not {shown(value)}")
        return value

    return check


def number(least: float, most: float, open_below: bool = False) -> Check:
    """Return the check of a number in [least, most], or in (least, most]."""

    def check(value: Any) -> float:
        fits = type(value) in (int, float) and least <= value <= most and not (open_below and value == least)
        if not fits:  # NaN and infinities among them: JSON's 1e999 is one
            range_ = f"above {least:g} and at most {most:g}" if open_below else f"from {least:g} to {most:g}"
            raise ValueError(f"must be a number {range_}, not {shown(value)}")
        return float(value)

    return check


def boolean(value: Any) -> bool:
    """Check true or false."""
    if type(value) is not bool:
        raise ValueError(f"must be true or false, not {shown(value)}")
    return value


def text(value: Any) -> str:
    """Check a text."""
    if type(value) is not str:
        raise ValueError(f"must be a text, not {shown(value)}")
    return value


def choice(*names: str) -> Check:
    """Return the check of one of some names."""

    def check(value: Any) -> str:
        if type(value) is not str or value not in names:
            raise ValueError(f"must be one of {', '.join(names)}, not {shown(value)}")
        return value

    return check


def stops(value: Any) -> list[str]:
    """Check `stop`: a text or some, none of them empty."""
    found = [value] if type(value) is str else value
    if type(found) is not list or len(found) > MOST_STOPS or not all(type(one) is str for one in found):
        raise ValueError(f"must be a text or a list of at most {MOST_STOPS} texts, not {shown(value)}")
    if not all(0 < len(one) <= LONGEST_STOP for one in found):
        raise ValueError(f"a stop string must have 1 to {LONGEST_STOP} characters")
    return found


def stream_options(value: Any) -> bool:
    """Check `stream_options`; return whether usage is wanted."""
    if type(value) is not dict or value.keys() - {"include_usage", "include_obfuscation"}:
        raise ValueError(f"must be an object with include_usage, not {shown(value)}")
    for one in value.values():
        boolean(one)
    return value.get("include_usage", False)


def prompts(value: Any) -> list[str | list[int]]:
    """Check `prompt`: a text, token ids, or a list of either."""
    found = value if type(value) is list and value and type(value[0]) in (str, list) else [value]
    for place, one in enumerate(found):
        if type(one) is not str and not (type(one) is list and all(type(token) is int for token in one)):
            where = f"number {place} " if len(found) > 1 else ""
            raise ValueError(f"{where}must be a text or a list of token ids, not {shown(one)}")
        if not one:
            raise ValueError(f"number {place} is empty: give it at least one token")
    return found


def ids(value: Any) -> list[int]:
    """Check token ids."""
    if type(value) is not list or not all(type(token) is int for token in value):
        raise ValueError(f"must be a list of token ids, not {shown(value)}")
    return value


def messages(value: Any) -> list[Message]:
    """Check `messages`; OpenAI calls the system `developer`, too.

    Returns:
        The turns as a chat template takes them: contents as texts, arguments of calls as objects.
    """
    if type(value) is list:
        value = [
            {**turn, "role": "system"} if type(turn) is dict and turn.get("role") == "developer" else turn
            for turn in value
        ]
    return read_messages(value)


def tools(value: Any) -> list[dict[str, Any]]:
    """Check `tools`: functions in OpenAI's form."""
    if type(value) is not list or len(value) > MOST_TOOLS:
        raise ValueError(f"must be a list of at most {MOST_TOOLS} tools, not {shown(value)}")
    for place, tool in enumerate(value):
        function = tool.get("function") if type(tool) is dict and tool.get("type") == "function" else None
        if type(function) is not dict or type(function.get("name")) is not str or not function["name"]:
            form = '{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}'
            raise ValueError(f"number {place} must be of the form {form}, not {shown(tool)}")
        if type(function.get("description", "")) not in (str, type(None)):
            raise ValueError(f"number {place}: description must be a text")
        parameters = function.get("parameters") or {}
        properties = parameters.get("properties", {}) if type(parameters) is dict else None
        if type(properties) is not dict or not all(type(field) is dict for field in properties.values()):
            raise ValueError(f"number {place}: parameters must be a JSON schema of an object")
    return value


def variables(value: Any) -> dict[str, bool | int | float | str]:
    """Check `chat_template_kwargs`: what a chat template is told beside messages and tools."""
    if type(value) is not dict:
        raise ValueError(f"must be an object such as {{'enable_thinking': false}}, not {shown(value)}")
    for name, one in value.items():
        if not name.isidentifier() or name in NO_VARIABLES:
            raise ValueError(f"{shown(name)} is no variable to set")
        finite = type(one) is float and math.isfinite(one)
        if type(one) not in (bool, int, str) and not finite:
            raise ValueError(f"{name} must be true, false, a number or a text, not {shown(one)}")
    return value


def _alike(values: tuple[Any, ...]) -> list[Any]:
    """Return values with the floats that equal their integers."""
    return [*values, *(float(value) for value in values if type(value) is int)]
