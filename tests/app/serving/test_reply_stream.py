"""A reply read as it comes is the reply read at once."""

import random

import pytest

from app.serving.reply_stream import ReplyStream
from datamodules.conversations.replies import read_reply

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "string"}}}}}]
CALL = "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>\n"
TEXTS = [
    "",
    "four",
    "\n\nfour\n",
    "a <tool_cal and <tool_call",
    "hm\n\n</think>\n\nfour\n",
    "hm</think>four",
    "<think>\nhm\n</think>\nfour",
    "<think></think>four",
    "<thin",
    "hm </think",
    "hm\n</think>\nI look.\n" + CALL,
    CALL + CALL,
    f"<think>\nhm {CALL} hm\n</think>\n{CALL}",
    CALL + "and more",
    CALL[:-15],
    "a\n\n" + CALL,
]


def read(pieces: list[str], thinking: bool, tools: list) -> dict:
    stream = ReplyStream(thinking, tools)
    message: dict = {"role": "assistant", "content": ""}
    for delta in [*map(stream.add, pieces), stream.finish()]:
        for name, value in delta.items():
            message[name] = message[name] + value if name in message else value
    return message


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("tools", [[], TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_say_what_the_whole_says(text: str, tools: list, thinking: bool) -> None:
    opens = thinking or text.startswith("<think>")
    thoughts, _, said = text.partition("</think>") if opens else ("", "", text)
    expected = read_reply(text, thinking, tools)
    if not opens and "</think>" in text:
        expected = {"role": "assistant", "content": text}  # nothing had said that it was a thought
    elif not tools and expected.pop("tool_calls", None):
        expected["content"] = said.removeprefix("\n") if thoughts else said
    cut = random.Random(0)
    for size in (1, 3, 1000):
        pieces, rest = [], text
        while rest:
            count = cut.randint(1, size)
            pieces, rest = [*pieces, rest[:count]], rest[count:]
        assert read(pieces, thinking, tools) == expected


def test_what_is_certain_is_not_held_back() -> None:
    stream = ReplyStream(True, TOOLS)
    assert stream.add("so ") == {"reasoning_content": "so "}
    assert stream.add("it is\n</th") == {"reasoning_content": "it is"}
    assert stream.add("ink>\nfo") == {"content": "fo"}
    assert stream.add("ur <too") == {"content": "ur "}
    assert stream.add("thbrush") == {"content": "<toothbrush"}
    assert stream.finish() == {}
