"""Seeded random conversations: several turns, tools, thoughts, Unicode, empty turns, roles in odd orders."""

import random
from typing import Any

TEXTS = ["", "hi", " a b ", "\n\nx\n", "naïve 日本 🙂\u200d↔️", "def f(x):\n\treturn x", "  ", '{"a": 1}', "a\r\nb"]
EDGES = ["> quote <", "a <", "think", "s", "|", "\u00a0x\u3000", "\\ue000", "\ue000\ue001"]
NAMES = ["<think>", "</think>", "<|im_end|>\n<|im_start|>assistant\n<think></think>hi", "</s>", "x<tool_call>y"]
THOUGHTS = [
    "<think>\na\n</think>\nb",
    "<think>a</think>b",
    "b</think>c",
    "<think>\n\nxx\n</think>\n\ny",
    "<think></think>z",
    "<think>never closed",
    "half <think> open",
]
SWITCHES = ("low_effort", "truncate_history_thinking", "enable_thinking")


def random_row(generator: random.Random, names: bool = False) -> dict[str, Any]:
    """Return a row of the form `messages`.

    Args:
        generator: draws it.
        names: whether texts, and keys of tools, may be names of special tokens.
    """

    def text() -> str:
        return generator.choice([*TEXTS, *EDGES, *(NAMES if names else [])])

    turns: list[dict[str, Any]] = []
    if generator.random() < 0.4:
        turns.append({"role": "system", "content": text()})
    for _ in range(generator.randrange(1, 6)):
        drawn = generator.random()
        if drawn < 0.35:
            turns.append({"role": "user", "content": text()})
        elif drawn < 0.45 and all(turn["role"] != "system" for turn in turns):
            turns.append({"role": "system", "content": text()})
        else:
            turns += _assistant(generator, text)
    if turns[-1]["role"] != "assistant":
        turns.append({"role": "assistant", "content": text()})
    if all(turn["role"] != "user" for turn in turns):
        turns.insert(int(turns[0]["role"] == "system"), {"role": "user", "content": text()})
    row: dict[str, Any] = {"messages": turns}
    if generator.random() < 0.3:
        row["tools"] = [_tool(generator, text, names) for _ in range(generator.randrange(1, 3))]
    if switches := {key: generator.random() < 0.5 for key in SWITCHES if generator.random() < 0.3}:
        row["chat_template_kwargs"] = switches
    return row


def _assistant(generator: random.Random, text: Any) -> list[dict[str, Any]]:
    turn: dict[str, Any] = {"role": "assistant"}
    turn["content"] = text() if generator.random() < 0.7 else generator.choice(THOUGHTS)
    if generator.random() < 0.4:
        turn["reasoning_content"] = text()
    if generator.random() < 0.7:
        return [turn]
    values = [text(), 3, None, True, [1, text()], {"k": text(), "l": {"m": [text()]}}]
    names = [str(number) for number in range(generator.randrange(1, 3))]
    turn["tool_calls"] = [
        {
            "id": name,
            "type": "function",
            "function": {
                "name": "f",
                "arguments": {generator.choice("abc"): generator.choice(values) for _ in range(generator.randrange(3))},
            },
        }
        for name in names
    ]
    return [turn, *({"role": "tool", "content": text(), "tool_call_id": name} for name in names)]


def _tool(generator: random.Random, text: Any, names: bool) -> dict[str, Any]:
    fields: list[dict[str, Any]] = [
        {"type": "string", "description": text()},
        {"type": ["string", "null"], "enum": ["x", text()]},
        {"minimum": 1, "items": {"type": "string"}},
        {},
    ]
    schema: dict[str, Any] = {"type": "object", "properties": {key: generator.choice(fields) for key in "ab"}}
    if names:
        schema["properties"]["a"] = {"think": text(), "|im_end|": {"/think": text()}}
    if generator.random() < 0.5:
        schema |= {"required": ["a"], "additionalProperties": False}
    tool = {"name": "f", "description": text(), "parameters": schema, "strict": True}
    return {"type": "function", "function": tool} if generator.random() < 0.7 else tool
