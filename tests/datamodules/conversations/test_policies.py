"""Reasoning modes, budgets and lengths: shares that are kept, thoughts that are cut, ends that hold."""

from collections import Counter

import numpy as np
import pytest

from datamodules.conversations.masks import Encoded, encode
from datamodules.conversations.messages import Conversation, read_conversation
from datamodules.conversations.policies import ReasoningModes, in_mode, shorten, thought_of

THOUGHT = "first 日本 I think of 17 and 4, then\n\tI add them up"


def thinking(content: str = "21", **turn: object) -> Conversation:
    said = {"role": "assistant", "content": content, **turn}
    before = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "<think>\nold\n</think>\ny"}]
    return read_conversation({"messages": [*before, {"role": "user", "content": "17 + 4?"}, said]}, "f:1")


FORMS = [
    thinking(reasoning_content=THOUGHT),
    thinking(f"<think>\n{THOUGHT}\n</think>\n21"),
    thinking(f"{THOUGHT}</think>21"),
]


def test_modes_have_their_shares() -> None:
    drawn = Counter(ReasoningModes().draw(3, number) for number in range(20_000))
    for mode, share in (("thinking_off", 0.03), ("low_effort", 0.02), ("truncated_thoughts", 0.12)):
        assert drawn[mode] / 20_000 == pytest.approx(share, abs=0.01)
    assert [ReasoningModes().draw(3, n) for n in range(100)] != [ReasoningModes().draw(4, n) for n in range(100)]
    assert {ReasoningModes(thinking_off=1, low_effort=0, truncated_thoughts=0).draw(0, n) for n in range(9)} == {
        "thinking_off"
    }


@pytest.mark.parametrize("case", FORMS)
def test_thinking_off_leaves_all_thoughts_out(case: Conversation, template_of) -> None:
    template = template_of()
    found = in_mode(case, "thinking_off", template, 0, 0)
    assert found.variables == {"enable_thinking": False}
    assert [message["content"] for message in found.messages] == ["x", "y", "17 + 4?", "21"]
    assert all("reasoning_content" not in message for message in found.messages)
    prompt = template.encode_prompt(found.messages[:-1], **found.variables)
    assert encode(found, template).tokens[: len(prompt)].tolist() == prompt


def test_low_effort_is_asked_for(template_of) -> None:
    for name in (None, "nemotron_3_super", "nemotron_3_nano"):
        template = template_of(name)
        found = encode(in_mode(FORMS[0], "low_effort", template, 0, 0), template)
        asked = "17 + 4?\n\n{reasoning effort: low}<|im_end|>"
        assert template.tokenizer.decode(found.tokens).count(asked) == 1, name


@pytest.mark.parametrize("case", FORMS)
@pytest.mark.parametrize("name", [None, "nemotron_3_super"])
def test_thoughts_end_at_the_budget(case: Conversation, name, template_of) -> None:
    template, budgets = template_of(name), set()
    whole = len(template.tokenizer.encode(THOUGHT))
    for number in range(40):
        found = in_mode(case, "truncated_thoughts", template, 5, number)
        assert found == in_mode(case, "truncated_thoughts", template, 5, number)
        budget, thought = found.variables["reasoning_budget"], thought_of(found.messages[-1])
        assert thought is not None
        assert THOUGHT.startswith(thought)
        length = len(template.tokenizer.encode(thought))
        assert budget - 3 <= length <= budget + 3 < whole + 3, "blanks at the cut, and bytes of a character, aside"
        text = template.tokenizer.decode(encode(found, template).tokens)
        assert f"17 + 4?\n\n{{thinking token budget: {budget}}}<|im_end|>" in text
        assert text.endswith("21<|im_end|>\n")
        assert "</think>" in text
        budgets.add(budget)
    assert len(budgets) > 10
    assert max(budgets) < whole


def test_a_budget_is_shared_by_the_thoughts_of_a_tool_loop(template_of) -> None:
    template = template_of()
    call = {"role": "assistant", "content": "", "reasoning_content": "one two three", "tool_calls": [{"name": "f"}]}
    turns = [{"role": "user", "content": "a"}, call, {"role": "tool", "content": "b"}]
    said = {"role": "assistant", "content": "c", "reasoning_content": "four five six"}
    case = read_conversation({"messages": [*turns, said]}, "f:1")
    sizes = [len(template.tokenizer.encode(turn["reasoning_content"])) for turn in (call, said)]
    for number in range(30):
        found = in_mode(case, "truncated_thoughts", template, 1, number)
        left = [found.messages[turn].get("reasoning_content", "") for turn in (1, 3)]
        kept = [len(template.tokenizer.encode(text)) for text in left]
        assert sum(kept) == found.variables["reasoning_budget"]
        assert kept[0] == sizes[0] or kept[1] == 0


@pytest.mark.parametrize("mode", ["thinking_off", "low_effort", "truncated_thoughts"])
def test_what_has_no_thoughts_or_a_mode_of_its_own_is_left_alone(mode, template_of) -> None:
    plain = read_conversation({"prompt": "a", "completion": "b"}, "f:1")
    own = read_conversation({"messages": FORMS[0].messages, "chat_template_kwargs": {"enable_thinking": True}}, "f:1")
    for case in (plain, own):
        assert in_mode(case, mode, template_of(), 0, 0) is case


def test_over_long() -> None:
    mask = np.array([0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0], dtype=bool)
    talk = Encoded(np.arange(11, dtype=np.int32), mask)
    for policy in ("drop", "turn", "cut"):
        assert shorten(talk, 11, policy) is talk
        assert shorten(talk, 2, policy) is None
    assert shorten(talk, 10, "drop") is None
    for length, left in ((10, 10), (9, 4), (7, 4), (4, 4)):
        found = shorten(talk, length, "turn")
        assert found is not None
        assert found.tokens.tolist() == list(range(left)), length
    assert shorten(talk, 3, "turn") is None
    found = shorten(talk, 9, "cut")
    assert found is not None
    assert found.mask.tolist() == mask[:9].tolist()
