"""What bodies of requests mean, and which are refused for which field."""

import json

import pytest

from app.serving import fields
from app.serving.errors import RequestError
from app.serving.requests import parse_chat, parse_completion
from modules.generation.sampling import Sampling

USER = {"role": "user", "content": "hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}}


def test_defaults_are_those_of_open_ai() -> None:
    completion = parse_completion({"prompt": "a"})
    assert (completion.prompts, completion.max_tokens, completion.n, completion.echo) == (["a"], 16, 1, False)
    assert (completion.sampling.temperature, completion.sampling.top_p, completion.logprobs) == (1.0, 1.0, None)
    chat = parse_chat({"messages": [USER]})
    assert (chat.messages, chat.max_tokens, chat.tools, chat.variables) == ([USER], None, [], {})
    assert parse_chat({"messages": [USER], "max_completion_tokens": 7}).max_tokens == 7
    assert parse_completion({"prompt": "a", "max_tokens": None, "stop": None, "user": None}) is not None


def test_every_field_is_read() -> None:
    body = {"prompt": [[1, 2], [3]], "max_tokens": 0, "echo": True, "n": 2, "temperature": 0, "top_p": 0.5}
    body |= {"top_k": 4, "min_p": 0.1, "seed": -5, "stop": "x", "stream": True, "logprobs": 5, "model": "m"}
    body |= {"stream_options": {"include_usage": True}, "return_token_ids": True}
    found = parse_completion(body)
    assert found.sampling == Sampling(temperature=0, top_k=4, top_p=0.5, min_p=0.1, seed=-5)
    assert (found.prompts, found.max_tokens, found.echo, found.n) == ([[1, 2], [3]], 0, True, 2)
    assert (found.stop, found.stream, found.include_usage, found.logprobs) == (["x"], True, True, 5)
    assert (found.model, found.return_token_ids) == ("m", True)


@pytest.mark.parametrize(
    ("given", "variables"),
    [
        ({"reasoning_effort": "none"}, {"enable_thinking": False}),
        ({"reasoning_effort": "low"}, {"low_effort": True}),
        ({"reasoning_effort": "high"}, {}),
        ({"chat_template_kwargs": {"enable_thinking": False, "other": 3}}, {"enable_thinking": False, "other": 3}),
        ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, {"enable_thinking": True}),
    ],
)
def test_what_the_template_is_told(given: dict, variables: dict) -> None:
    assert parse_chat({"messages": [USER], **given}).variables == variables


def test_turns_are_as_a_template_takes_them() -> None:
    turns = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "x"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        {"role": "assistant", "content": "c", "reasoning_content": "d", "tool_calls": []},
    ]
    function = {"name": "f", "arguments": {"x": 1}}
    assert parse_chat({"messages": turns}).messages == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "ab", "name": "x"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": function}]},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        {"role": "assistant", "content": "c", "reasoning_content": "d", "tool_calls": []},
    ]


def test_what_changes_nothing_is_passed_over() -> None:
    given = {"user": "u", "metadata": {}, "store": True, "service_tier": "auto", "verbosity": "low"}
    given |= {"frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "response_format": {"type": "text"}}
    given |= {"parallel_tool_calls": True, "modalities": ["text"]}
    assert parse_chat({"messages": [USER], **given}).max_tokens is None


NOT_TEXT = [5, True, 1.5, [], {}, ["a", 1]]
NOT_BOOLEAN = [0, 1, "true", [], {}, 0.0]
NOT_NUMBER = ["0", True, [], {}, float("nan"), float("inf"), -1, -0.5, 10**400, 1e308, "NaN"]
NOT_INTEGER = ["1", True, 1.0, 1.5, [], {}, float("nan"), 10**400]
COMMON = {
    "model": NOT_TEXT,
    "max_tokens": [*NOT_INTEGER, -1],
    "n": [*NOT_INTEGER, 0, -1, 10**6],
    "temperature": [*NOT_NUMBER, 2.1],
    "top_p": [*NOT_NUMBER, 0, 1.1],
    "top_k": [*NOT_INTEGER, -1],
    "min_p": [*NOT_NUMBER, 1.1],
    "seed": [*NOT_INTEGER, 2**63],
    "stop": [5, True, {}, "", [""], ["a", 1], [[]], ["a"] * 17, "a" * 2000],
    "stream": NOT_BOOLEAN,
    "return_token_ids": NOT_BOOLEAN,
    "frequency_penalty": [0.5, "0", True],
    "presence_penalty": [-2, 1],
    "logit_bias": [{"5": 1}, [], 0],
    "temprature": [1],
    "": [1],
    "x" * 5000: [1],
}
COMPLETION = COMMON | {
    "prompt": [5, True, {}, "", [], [""], [[]], ["a", 5], [1, "a"], [1.0], [True], [None], [[1], "a", [1.5]], [[[1]]]],
    "echo": NOT_BOOLEAN,
    "logprobs": [*NOT_INTEGER, -1, 6],
    "suffix": ["x", 5],
    "best_of": [2, True, "1"],
    "messages": [[USER]],
}
CHAT = COMMON | {
    "messages": [
        *NOT_TEXT,
        "hi",
        [None],
        [{}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"content": "a"}],
        [{"role": "bot", "content": "a"}],
        [{"role": ["user"], "content": "a"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": {}}],
        [{"role": "user", "content": [5]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "text", "text": None}]}],
        [{"role": "user", "content": "a", "tool_calls": [CALL]}],
        [{"role": "assistant", "content": None}],
        [{"role": "assistant", "tool_calls": []}],
        [{"role": "assistant", "tool_calls": {}}],
        [{"role": "assistant", "tool_calls": [5]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 5}}]}],
        [{"role": "assistant", "content": "a", "reasoning_content": 5}],
        [{"role": "tool", "content": "a"}],
        [{"role": "developer", "content": "a"}, {"role": "system", "content": "a"}, USER],
    ],
    "tools": [5, {}, "f", [5], [{}], [{"type": "function"}], [TOOL | {"type": "x"}], [TOOL] * 129]
    + [[{"type": "function", "function": {"name": "f", "parameters": wrong}}] for wrong in (5, {"properties": 5})]
    + [[{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": 5}}}}]]
    + [[{"type": "function", "function": {"name": name}}] for name in ("", 5, None)]
    + [[{"type": "function", "function": {"name": "f", "description": 5}}]],
    "tool_choice": ["required", "x", 5, {"type": "function", "function": {"name": "f"}}],
    "logprobs": [*NOT_BOOLEAN, 5],
    "top_logprobs": [*NOT_INTEGER, -1, 21, 5],
    "max_completion_tokens": [*NOT_INTEGER, 0, -1],
    "reasoning_effort": ["most", 5, ["low"]],
    "chat_template_kwargs": [
        5,
        [],
        "x",
        {"messages": []},
        {"block": 1},
        {"a b": 1},
        {"a": [1]},
        {"a": None},
        {"a": float("nan")},
    ],
    "response_format": [{"type": "json_object"}, "text"],
    "functions": [[{"name": "f"}]],
    "audio": [{"voice": "x"}],
    "prompt": ["a"],
}
REFUSED = [
    (path, name, value)
    for path, table in (("completions", COMPLETION), ("chat/completions", CHAT))
    for name, values in table.items()
    for value in values
]
"""(path, field, a value that it must not have)."""


def body_of(path: str, name: str, value: object) -> dict:
    """Return a body that is right but for one field."""
    return ({"prompt": "a"} if path == "completions" else {"messages": [USER]}) | {name: value}


@pytest.mark.parametrize(("path", "name", "value"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_is_wrong_is_named(path: str, name: str, value: object) -> None:
    parse = parse_completion if path == "completions" else parse_chat
    with pytest.raises(RequestError) as caught:
        parse(body_of(path, name, value))
    error = caught.value.body()["error"]
    assert name[:40] in error["message"]
    assert error["param"] == name[:80]
    assert len(error["message"]) < 1000
    json.dumps(error, allow_nan=False)


@pytest.mark.parametrize(
    ("parse", "body", "param"),
    [
        (parse_completion, {}, "prompt"),
        (parse_completion, {"prompt": None}, "prompt"),
        (parse_chat, {}, "messages"),
        (parse_completion, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        (parse_completion, {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        (parse_completion, {"prompt": "a", "stream": True, "stream_options": {"usage": True}}, "stream_options"),
        (parse_completion, {"prompt": "a", "stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
        (parse_chat, {"messages": [USER], "max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        (parse_chat, {"messages": [USER], "max_tokens": 0}, "max_tokens"),
    ],
)
def test_fields_that_do_not_fit_each_other(parse, body: dict, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(body)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b'"prompt"',
        b"null",
        b'{"prompt": NaN}',
        b'{"prompt": Infinity}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": ["a", {"b": "\\udc00"}]}',
        b'{"\\ud800": 1}',
        b'{"a": ' + b"[" * 10**5,
        b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
        b'{"seed": ' + b"9" * 5000 + b"}",
        b"\x00",
        b'{"prompt": "a"} {}',
        "{'prompt': 'a'}".encode("utf-16"),
    ],
    ids=lambda body: repr(body[:20]),
)
def test_a_body_that_is_no_object(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        fields.parse_json(body)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 400


def test_escapes_of_whole_characters_are_taken() -> None:
    assert fields.parse_json(b'{"a": "\\ud83d\\ude00 \\u00e9"}') == {"a": "\U0001f600 é"}
