"""What a request asks for: its JSON as typed values, or the answer that says what is wrong with it."""

import secrets
from dataclasses import dataclass, field
from typing import Any

from app.serving import fields
from app.serving.errors import RequestError
from modules.batch import Message
from modules.generation.sampling import Sampling

MOST_LOGPROBS, MOST_TOP_LOGPROBS = 5, 20
"""OpenAI's limits of completions and of chats."""
MOST_TOKENS = 2**31
"""What no context exceeds; the real limit needs the prompt, see `server`."""
_COMMON: dict[str, fields.Check] = {
    "model": fields.text,
    "max_tokens": fields.integer(1, MOST_TOKENS),
    "n": fields.integer(1, 1024),
    "temperature": fields.number(0, 2),
    "top_p": fields.number(0, 1, open_below=True),
    "top_k": fields.integer(0, MOST_TOKENS),
    "min_p": fields.number(0, 1),
    "seed": fields.integer(-(2**63), 2**63 - 1),
    "stop": fields.stops,
    "stream": fields.boolean,
    "stream_options": fields.stream_options,
    "return_token_ids": fields.boolean,
}
_COMPLETION = _COMMON | {
    "prompt": fields.prompts,
    "max_tokens": fields.integer(0, MOST_TOKENS),
    "echo": fields.boolean,
    "logprobs": fields.integer(0, MOST_LOGPROBS),
}
_CHAT = _COMMON | {
    "messages": fields.messages,
    "tools": fields.tools,
    "tool_choice": fields.choice("auto", "none"),
    "max_completion_tokens": fields.integer(1, MOST_TOKENS),
    "logprobs": fields.boolean,
    "top_logprobs": fields.integer(0, MOST_TOP_LOGPROBS),
    "reasoning_effort": fields.choice("none", "minimal", "low", "medium", "high", "xhigh"),
    "chat_template_kwargs": fields.variables,
}
_EFFORTS: dict[str, dict[str, Any]] = {
    "none": {"enable_thinking": False},
    "minimal": {"low_effort": True},
    "low": {"low_effort": True},
}
"""What a chat template is told of OpenAI's `reasoning_effort`; of others nothing."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What completions and chats have in common."""

    model: str | None = None
    max_tokens: int | None = None
    """None: as many as there is room for."""
    n: int = 1
    sampling: Sampling
    stop: list[str]
    stream: bool = False
    include_usage: bool = False
    logprobs: int | None = None
    """How many of the most likely tokens are wanted beside each token's log-probability; None: no log-probabilities."""
    return_token_ids: bool = False


@dataclass(frozen=True, kw_only=True)
class CompletionRequest(Request):
    """A body of /v1/completions."""

    prompts: list[str | list[int]]
    echo: bool = False


@dataclass(frozen=True, kw_only=True)
class ChatRequest(Request):
    """A body of /v1/chat/completions."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    variables: dict[str, Any] = field(default_factory=dict)
    """What the chat template is told."""


def parse_completion(body: dict[str, Any]) -> CompletionRequest:
    """Read a body of /v1/completions; 16 tokens unless it asks for others, as OpenAI has it.

    Raises:
        RequestError: something is wrong with it.
    """
    found = fields.parse_fields(body, _COMPLETION, ("prompt",))
    if found.get("max_tokens") == 0 and not found.get("echo"):
        raise RequestError("max_tokens: 0 asks for nothing without echo", param="max_tokens")
    return CompletionRequest(
        **_common(found, found.get("max_tokens", 16)),
        logprobs=found.get("logprobs"),
        prompts=found["prompt"],
        echo=found.get("echo", False),
    )


def parse_chat(body: dict[str, Any]) -> ChatRequest:
    """Read a body of /v1/chat/completions.

    Raises:
        RequestError: something is wrong with it.
    """
    if isinstance(body.get("tool_choice"), dict) or body.get("tool_choice") == "required":
        raise RequestError("tool_choice: the model cannot be made to call; give auto or none", param="tool_choice")
    found = fields.parse_fields(body, _CHAT, ("messages",))
    if "top_logprobs" in found and not found.get("logprobs"):
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    limits = [found[name] for name in ("max_tokens", "max_completion_tokens") if name in found]
    if len(set(limits)) > 1:
        raise RequestError(
            "max_tokens and max_completion_tokens mean the same; give one of them", param="max_completion_tokens"
        )
    return ChatRequest(
        **_common(found, limits[0] if limits else None),
        logprobs=found.get("top_logprobs", 0) if found.get("logprobs") else None,
        messages=found["messages"],
        tools=[] if found.get("tool_choice") == "none" else found.get("tools", []),
        variables=_EFFORTS.get(found.get("reasoning_effort", ""), {}) | found.get("chat_template_kwargs", {}),
    )


def _common(found: dict[str, Any], max_tokens: int | None) -> dict[str, Any]:
    if "stream_options" in found and not found.get("stream"):
        raise RequestError("stream_options needs stream: true", param="stream_options")
    return {
        "model": found.get("model"),
        "max_tokens": max_tokens,
        "n": found.get("n", 1),
        "sampling": Sampling(
            temperature=found.get("temperature", 1.0),
            top_k=found.get("top_k", 0),
            top_p=found.get("top_p", 1.0),
            min_p=found.get("min_p", 0.0),
            seed=found["seed"] if "seed" in found else secrets.randbits(63),
        ),
        "stop": found.get("stop", []),
        "stream": found.get("stream", False),
        "include_usage": found.get("stream_options", False),
        "return_token_ids": found.get("return_token_ids", False),
    }
