"""Rendered conversations against transformers' `apply_chat_template`."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from datamodules.conversations.template import CHAT_ML, ChatTemplate
from datamodules.tokenizer import Tokenizer
from modules.errors import UserError

TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is 2 + 2?", "name": None},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "naïve <think> 日本?"},
]
TEMPLATE = """\
{%- if messages[0].role == 'assistant' %}{{ raise_exception('the user begins') }}{% endif %}
{{- bos_token }}
{%- for message in messages if message.content %}
    {%- if message.role == 'stop' %}{% break %}{% endif %}
<|im_start|>{{ message.role | trim }}{% if message.name is defined %} ({{ message.name }}){% endif %}

{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
<think>{% if not enable_thinking | default(true) %}</think>{% endif %}
{%- endif %}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Tokenizer.train(["what is a naïve text? be short.\n"] * 9, 300).save(tmp_path)
    return tmp_path


def in_config(folder: Path, template: object) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))


@pytest.mark.parametrize("place", ["file", "config", "by name", "both"])
@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
def test_text_and_tokens_are_those_of_transformers(folder: Path, place: str, answer: bool, variables: dict) -> None:
    if place in ("file", "both"):
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    if place != "file":
        templates = {"config": TEMPLATE, "by name": [{"name": "default", "template": TEMPLATE}], "both": "old"}
        in_config(folder, templates[place])
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = ChatTemplate(Tokenizer.load(folder))
    expected = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=answer, **variables)
    assert ours.render(TALK, answer=answer, **variables) == expected
    ids = theirs.apply_chat_template(TALK, add_generation_prompt=answer, return_dict=False, **variables)
    assert ours.encode(TALK, answer=answer, **variables) == ids
    assert ids.count(10) == len(TALK) + answer


def test_without_a_template_the_plain_form_is_used(folder: Path) -> None:
    ours = ChatTemplate(Tokenizer.load(folder))
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        TALK, chat_template=CHAT_ML, tokenize=False, add_generation_prompt=True
    )
    assert ours.render(TALK, answer=True) == expected
    assert expected.startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n")
    assert expected.endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (TEMPLATE, 11),
        ("{% for m in messages %}{{ m.content }}\n</s>{% endfor %}", 2),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
    ],
)
def test_the_token_that_ends_a_turn_is_read_off_the_template(folder: Path, template: str, end: int | None) -> None:
    (folder / "chat_template.jinja").write_text(template)
    assert ChatTemplate(Tokenizer.load(folder)).turn_end() == end


def test_what_a_template_refuses_is_said(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with pytest.raises(UserError, match=r"^chat template: .*\(the user begins\)"):
        ChatTemplate(Tokenizer.load(folder)).render(TALK[2:], answer=True)
    (folder / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(UserError, match=r"^chat template: "):
        ChatTemplate(Tokenizer.load(folder)).render(TALK, answer=True)


def test_a_tokenizer_without_turns_is_refused(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<|im_end|>", "<|other|>"))
    with pytest.raises(UserError, match=r"has no chat_template.jinja and no chat_template in tokenizer_config.json"):
        ChatTemplate(Tokenizer.load(folder))
