"""Rows of the three forms, and what is wrong with malformed ones."""

import json

import pytest

from datamodules.conversations.messages import ConversationError, read_conversation, read_line

ASK = {"role": "user", "content": "a"}
SAY = {"role": "assistant", "content": "b"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}
RESULT = {"role": "tool", "content": "c", "tool_call_id": "1"}


def test_messages() -> None:
    row = {
        "messages": [
            {"role": "system", "content": None, "x": None} | {"content": [{"type": "text", "text": "be "}] * 2},
            ASK | {"name": None},
            CALL
            | {"thinking": "hm", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a": [1]}'}}]},
            RESULT,
            {"role": "assistant", "content": None, "reasoning_content": "only thoughts"},
        ],
        "tools": json.dumps([{"type": "function", "function": {"name": "f"}}]),
        "weight": 2,
        "chat_template_kwargs": {"enable_thinking": True, "low_effort": None},
    }
    found = read_conversation(row, "f:1")
    assert [message["content"] for message in found.messages] == ["be be ", "a", "", "c", ""]
    assert found.messages[2]["tool_calls"] == [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": [1]}}}
    ]
    assert (found.messages[2]["reasoning_content"], found.messages[1]) == ("hm", ASK)
    assert found.tools == [{"type": "function", "function": {"name": "f"}}]
    assert (found.weight, found.variables, found.prompt_turns) == (2.0, {"enable_thinking": True}, 0)


@pytest.mark.parametrize(
    ("row", "given"),
    [
        ({"messages": [ASK, SAY]}, 0),
        ({"prompt": "a", "completion": "b"}, 1),
        ({"prompt": [ASK], "completion": [SAY]}, 1),
        ({"prompt": [ASK], "completion": "b"}, 1),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, 0),
        ({"conversations": [ASK, SAY], "messages": None}, 0),
    ],
)
def test_three_forms_say_the_same(row: dict, given: int) -> None:
    found = read_line(json.dumps(row), "f:1")
    assert (found.messages, found.prompt_turns) == ([ASK, SAY], given)


def test_calls_of_sharegpt() -> None:
    turns = [
        ("human", "a"),
        ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
        ("observation", "c"),
        ("gpt", "d"),
    ]
    row = {"system": "s", "conversations": [{"from": speaker, "value": value} for speaker, value in turns]}
    found = read_conversation(row | {"tools": '[{"name": "f"}]'}, "f:1")
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert found.messages[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert found.tools == [{"name": "f"}]


@pytest.mark.parametrize(
    "turns",
    [
        [ASK, CALL],
        [ASK, CALL, RESULT, SAY],
        [ASK, CALL, RESULT],
        [SAY, ASK, ASK, {"role": "system", "content": "s"}, SAY, SAY],
        [ASK, CALL, {"role": "tool", "content": "no id"}, SAY],
        [ASK | {"tool_calls": []}, SAY | {"tool_calls": []}],
    ],
)
def test_orders_that_are_fine(turns: list) -> None:
    assert len(read_conversation({"messages": turns}, "f:1").messages) == len(turns)


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        (
            {"messages": [{"role": "wizard", "content": "a"}, SAY]},
            "unknown role",
            "turn 1 has the unknown role 'wizard'",
        ),
        ({"messages": [{"role": ["user"], "content": "a"}, SAY]}, "unknown role", "turn 1"),
        ({"messages": [ASK, {"role": "assistant"}]}, "missing content", "turn 2 (assistant) has no content"),
        ({"messages": [{"role": "user", "content": None}, SAY]}, "missing content", "turn 1 (user)"),
        ({"messages": [ASK, CALL, SAY]}, "call without result", "before turn 3 the result of a call of f is missing"),
        ({"messages": [ASK, CALL, ASK, RESULT, SAY]}, "call without result", "before turn 3"),
        ({"messages": [ASK, RESULT, SAY]}, "result without call", "turn 2 is a result of no call"),
        ({"messages": [ASK, CALL, RESULT, RESULT, SAY]}, "result without call", "turn 4"),
        ({"messages": [ASK, CALL, RESULT | {"tool_call_id": "2"}, SAY]}, "result without call", "turn 3"),
        ({"messages": [{"role": "system", "content": "s"}] * 2 + [ASK, SAY]}, "two system turns", "more than one"),
        ({"messages": [ASK]}, "no assistant turn", "nothing would be learnt"),
        ({"prompt": [ASK, SAY], "completion": [ASK]}, "no assistant turn", "the completion has no assistant's turn"),
        ({"messages": []}, "empty conversation", "at least one turn"),
        ({"messages": "a"}, "wrong type", "messages must be a list of turns"),
        ({"messages": ["a"]}, "wrong type", "turn 1 must be an object with role and content, not a text"),
        ({"messages": [ASK, SAY | {"content": 3}]}, "wrong type", "turn 2: content must be a text, not a number"),
        ({"messages": [ASK, SAY | {"content": [{"type": "image"}]}]}, "wrong type", "parts of the type text"),
        ({"messages": [ASK, SAY | {"tool_calls": {}}]}, "wrong type", "turn 2: tool_calls must be a list"),
        ({"messages": [ASK, SAY | {"tool_calls": [{}]}]}, "wrong type", "turn 2: call 1 must be"),
        (
            {"messages": [ASK, SAY | {"tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "wrong type",
            "call 1: it is no",
        ),
        (
            {"messages": [ASK, SAY | {"tool_calls": [{"name": "f", "arguments": [1]}]}]},
            "wrong type",
            "must be an object",
        ),
        ({"messages": [ASK | {"tool_calls": [{"name": "f"}]}, SAY]}, "wrong type", "only an assistant's turn"),
        ({"messages": [ASK, SAY], "tools": "["}, "wrong type", "tools: it is no JSON"),
        ({"messages": [ASK, SAY], "tools": [{"type": "function"}]}, "wrong type", "tool 1 must be"),
        ({"messages": [ASK, SAY], "weight": 0}, "wrong type", "weight must be a number above 0, up to 1e+30, not 0"),
        ({"messages": [ASK, SAY], "weight": 1e39}, "wrong type", "up to 1e+30, not 1e+39"),
        ({"messages": [ASK, SAY], "weight": 1e-50}, "wrong type", "weight must be"),
        ({"messages": [ASK, SAY], "weight": 10**400}, "wrong type", "weight must be"),
        ({"messages": [ASK, SAY], "chat_template_kwargs": [1]}, "wrong type", "chat_template_kwargs must be"),
        ({"messages": [ASK, SAY], "chat_template_kwargs": {"tools": []}}, "wrong type", "tools is no variable"),
        ({"messages": [ASK, SAY], "chat_template_kwargs": {"block": 1}}, "wrong type", "block is no variable"),
        ({"prompt": "a"}, "missing content", "completion is missing"),
        ({"text": "a"}, "no conversation", "this one has text"),
        ([], "wrong type", "a row must be an object, not a list"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "unknown role", "'alien'"),
        ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "b"}]}, "missing content", "turn 1 (user)"),
    ],
)
def test_malformed_rows(row: object, kind: str, reason: str) -> None:
    with pytest.raises(ConversationError) as error:
        read_conversation(row, "talks.jsonl:7")
    assert error.value.kind == kind
    assert reason in error.value.reason
    assert str(error.value) == f"talks.jsonl:7: {error.value.reason}"
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", ['{"messages": [', "", "[" * 100_000, "nonsense"])
def test_a_broken_line(line: str) -> None:
    with pytest.raises(ConversationError, match=r"^f:9: the line is no JSON") as error:
        read_line(line, "f:9")
    assert error.value.kind == "broken line"
