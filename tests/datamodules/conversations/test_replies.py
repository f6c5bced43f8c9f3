"""Replies read back are the messages that a Nemotron template renders to them."""

import json
import random

import pytest

from datamodules.conversations.replies import read_reply, thinks

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "hourly": {"type": "boolean"},
                    "where": {"type": "object"},
                },
            },
        },
    }
]
CALL = "<tool_call>\n<function=weather>\n{}</function>\n</tool_call>\n"
CITY = "<parameter=city>\n{}\n</parameter>\n"


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("four", False, {"content": "four"}),
        ("two and two\n</think>\nfour", True, {"content": "four", "reasoning_content": "two and two"}),
        ("<think>\ntwo and two\n</think>\nfour", False, {"content": "four", "reasoning_content": "two and two"}),
        ("never done", True, {"content": "", "reasoning_content": "never done"}),
        ("<think>\nnever done", False, {"content": "", "reasoning_content": "never done"}),
        ("a <think> in the text", False, {"content": "a <think> in the text"}),
        ("a</think>b</think>c", True, {"content": "c", "reasoning_content": "a</think>b"}),
        ("</think>\n\n  four\n", True, {"content": "\n  four\n"}),
        ("", True, {"content": ""}),
    ],
)
def test_thoughts_end_with_the_last_mark(text: str, thinking: bool, expected: dict) -> None:
    assert read_reply(text, thinking) == {"role": "assistant", **expected}


def test_calls_are_typed_by_the_tools() -> None:
    body = CITY.format("Paris\nand 3") + "<parameter=days>\n3\n</parameter>\n<parameter=hourly>\nTrue\n</parameter>\n"
    body += '<parameter=where>\n{"x": [1, "2"]}\n</parameter>\n<parameter=other>\n7\n</parameter>\n'
    message = read_reply("hm\n</think>\nI look.\n" + CALL.format(body), True, TOOLS)
    assert message["content"] == "I look."
    (call,) = message["tool_calls"]
    assert call["function"] == {
        "name": "weather",
        "arguments": {"city": "Paris\nand 3", "days": 3, "hourly": True, "where": {"x": [1, "2"]}, "other": "7"},
    }
    bare = read_reply(CALL.format(body), False, [TOOLS[0]["function"]])
    assert bare["tool_calls"] == message["tool_calls"]
    assert bare["content"] == ""
    assert read_reply(CALL.format(""), False)["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"properties": {"city": {"type": ["integer", "null"]}}}, 3),
        ({"properties": {"city": {"type": ["string", "null"]}}}, "3"),
        ({"properties": {"city": True}}, "3"),
        ({"properties": [1]}, "3"),
        ([], "3"),
        (None, "3"),
    ],
)
def test_schemas_of_any_kind(schema: object, value: object) -> None:
    tools = [{"name": "weather", "parameters": schema}, {"name": "weather"}]
    (call,) = read_reply(CALL.format(CITY.format(3)), False, tools)["tool_calls"]
    assert call["function"]["arguments"] == {"city": value}


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n<function=weather>\n",
        CALL.format("") + "and more",
        CALL.format("") + "<tool_call>\n<function=weather>\n</function>\n",
        CALL.format("no argument\n"),
        CALL.format("<parameter=city>\nParis\n"),
    ],
)
def test_what_is_no_complete_call_stays_text(text: str) -> None:
    assert read_reply(text, False, TOOLS) == {"role": "assistant", "content": text}


def test_several_calls() -> None:
    cities = ["Rome", "", "</parameter", "<tool_call>"]
    text = "".join(CALL.format(CITY.format(city)) for city in cities)
    calls = read_reply(text, False, TOOLS)["tool_calls"]
    assert [call["function"]["arguments"]["city"] for call in calls] == cities


def test_a_call_that_is_rendered_is_read_back() -> None:
    draw = random.Random(0)
    for _ in range(200):
        arguments = {
            "city": "".join(draw.choice("ab \n<>/&é=") for _ in range(draw.randint(0, 12))),
            "days": draw.randint(-5, 5),
            "where": {"x": draw.random(), "y": [None, True, "s"]},
        }
        shown = {key: json.dumps(value) if isinstance(value, dict) else str(value) for key, value in arguments.items()}
        body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in shown.items())
        message = read_reply(CALL.format(body), False, TOOLS)
        assert message["tool_calls"][0]["function"]["arguments"] == arguments, body


def test_a_model_that_repeats_itself_is_read_at_once() -> None:
    text = 60 * CALL.format(60 * CITY.format("x")) + "and more"
    assert read_reply(text, False, TOOLS)["content"] == text


def test_whether_a_prompt_opens_a_thought() -> None:
    assert thinks("<|im_start|>assistant\n<think>\n")
    assert not thinks("<|im_start|>assistant\n<think></think>")
    assert not thinks("<|im_start|>assistant\n")
