"""Our Nemotron template against trl's copies of NVIDIA's, as transformers renders them."""

import random

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from datamodules.conversations.template import NEMOTRON
from tests.datamodules.conversations.conftest import THEIRS
from tests.datamodules.conversations.random_rows import TEXTS, random_row

TEMPLATES = ["nemotron_3_super", "nemotron_3_super_training", "nemotron_3_nano", "nemotron_3_nano_training"]


def rendered(source: str, turns: list, **options: object) -> object:
    try:
        return render_jinja_template([turns], chat_template=source, return_assistant_tokens_mask=True, **options)
    except (TemplateError, TypeError) as error:
        return type(error)


def random_case(generator: random.Random) -> tuple[list, dict]:
    """Turns and variables, now and then such as no reader lets through: templates agree on those too."""
    row = random_row(generator, names=True)
    turns = row["messages"]
    if generator.random() < 0.3:
        generator.shuffle(turns)
    for turn in turns:
        if generator.random() < 0.05:
            turn["content"] = generator.choice([None, ["a"], [], {"a": 1}])
        if generator.random() < 0.03:
            turn["role"] = generator.choice(["developer", "tool", "system", "other"])
        for call in turn.get("tool_calls", []):
            if generator.random() < 0.1:
                call["function"].pop("arguments")
    tools = row.get("tools", generator.choice([None, []]))
    if tools and generator.random() < 0.3:
        function = tools[0].get("function", tools[0])
        function["parameters"] = generator.choice(
            [None, {}, {"properties": None, "required": None}, {"$defs": {"q": 1}}]
        )
        function |= {"description": generator.choice(TEXTS)}
    options = {**row.get("chat_template_kwargs", {}), "add_generation_prompt": generator.random() < 0.4}
    return turns, {**options, "tools": tools}


@pytest.mark.parametrize("name", TEMPLATES)
def test_renderings_and_marks_are_theirs(name: str) -> None:
    if not THEIRS.is_dir():
        pytest.skip("trl is not installed")
    theirs, ours = (THEIRS / f"{name}.jinja").read_text(), NEMOTRON.read_text()
    generator = random.Random(5)
    refused = 0
    for _ in range(1000):
        turns, options = random_case(generator)
        if "nano" in name:
            options.pop("low_effort", None)
        expected, found = rendered(theirs, turns, **options), rendered(ours, turns, **options)
        if isinstance(expected, type):
            refused += 1
            assert found is expected, (turns, options)
            continue
        assert isinstance(found, tuple), (turns, options)
        assert found[0] == expected[0], (turns, options)
        if "training" in name:
            assert found[1] == expected[1], (turns, options)
    assert refused < 200


def test_a_budget_is_told_at_the_last_user_turn() -> None:
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    source = NEMOTRON.read_text()
    (text,), _ = render_jinja_template([turns], chat_template=source, reasoning_budget=7)
    (without,), _ = render_jinja_template([turns], chat_template=source)
    assert text == without.replace("c<|im_end|>", "c\n\n{thinking token budget: 7}<|im_end|>")
