"""Tokens and masks of conversations against transformers' and trl's, and against what a model is asked to write."""

import random

import numpy as np
import pytest
from transformers import AutoTokenizer

from datamodules.conversations.masks import Encoded, encode
from datamodules.conversations.messages import Conversation, ConversationError, read_conversation
from datamodules.conversations.policies import thought_of
from datamodules.conversations.template import CHAT_ML, ChatTemplate
from datamodules.tokenizer import Tokenizer
from tests.datamodules.conversations.random_rows import random_row

MARKED = ["nemotron_3_super_training", "nemotron_3_nano_training", "nemotron_3_ultra_training", None]
THINKS = "nemotron_3_super_training"


def random_conversations(seed: int, count: int, names: bool = False) -> list[Conversation]:
    generator = random.Random(seed)
    return [read_conversation(random_row(generator, names), f"file.jsonl:{n}") for n in range(count)]


def conversation(*turns: tuple[str, str], **options: object) -> Conversation:
    messages = [{"role": role, "content": text} for role, text in turns]
    return read_conversation({"messages": messages, **options}, "file.jsonl:3")


def learnt(encoded: Encoded, template: ChatTemplate) -> list[str]:
    """Return the texts of the runs of the mask."""
    edges = np.flatnonzero(np.diff([0, *encoded.mask, 0]))
    return [template.tokenizer.decode(encoded.tokens[first:stop]) for first, stop in edges.reshape(-1, 2)]


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("in_content", [False, True])
def test_the_templates_mask_is_that_of_transformers(name, in_content: bool, template_of, folder_of) -> None:
    template = template_of(name, in_content)
    theirs = AutoTokenizer.from_pretrained(folder_of(name or THINKS))
    for case in random_conversations(1, 150):
        expected = theirs.apply_chat_template(
            case.messages,
            tools=case.tools or None,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **case.variables if "ultra" not in str(name) else {},
        )
        if "ultra" in str(name):
            case = Conversation(messages=case.messages, tools=case.tools)
        if "nano" in str(name) and case.variables.get("low_effort"):
            continue
        found = encode(case, template, "template")
        assert found.tokens.tolist() == expected["input_ids"], case
        assert found.mask.astype(int).tolist() == expected["assistant_masks"], case
        assert (found.tokens.dtype, found.mask.dtype) == (np.int32, np.bool_)


@pytest.mark.parametrize("name", ["super", "nano", "ultra"])
@pytest.mark.parametrize("mask", ["template", "generated"])
def test_comparing_renderings_tells_what_marks_tell(name: str, mask, template_of) -> None:
    marked, unmarked = (template_of(f"nemotron_3_{name}{kind}") for kind in ("_training", ""))
    for case in random_conversations(2, 60, names=True):
        expected, found = encode(case, marked, mask), encode(case, unmarked, mask)
        assert np.array_equal(found.tokens, expected.tokens)
        assert np.array_equal(found.mask, expected.mask), case


@pytest.mark.parametrize("name", ["nemotron_3_super", "nemotron_3_ultra", "qwen3", "qwen2_5", None])
def test_what_is_learnt_of_the_last_turn_is_what_a_model_goes_on_with(name, template_of) -> None:
    """The prompt that `generate` would be given, then the run of the mask, are the tokens of the conversation."""
    template = template_of(name)
    compared = 0
    for case in random_conversations(3, 150):
        *before, last = case.messages
        thinks = thought_of(last) is not None
        variables = {**case.variables, "enable_thinking": thinks}
        try:
            found = encode(case, template)
        except ConversationError:  # Qwen's puts an empty thought where one was opened and never closed
            assert name == "qwen3"
            continue
        prompt = template.encode_prompt(before, case.tools, **variables)
        first = int(np.flatnonzero(np.diff([0, *found.mask]) == 1)[-1])
        if found.tokens[: len(prompt)].tolist() != prompt:
            continue  # no prompt of the template's begins so: `<think>a` without a line break, a tag never closed
        compared += 1
        assert first == len(prompt), case
        assert found.tokens[found.mask.nonzero()[0][-1]] == template.turn_end()
    assert compared > 90


def test_what_is_learnt(template_of) -> None:
    template = template_of()
    talk = conversation(("user", "a"), ("assistant", "<think>\nb\n</think>\nc"), ("user", "d"), ("assistant", "e"))
    assert learnt(encode(talk, template), template) == ["\nc<|im_end|>", "e<|im_end|>"]
    assert learnt(encode(talk, template, "template"), template) == [
        "<think></think>\nc<|im_end|>\n",
        "<think></think>e<|im_end|>\n",
    ]
    thinks = conversation(("user", "a"), ("assistant", "<think>\nb\n</think>\nc"))
    assert learnt(encode(thinks, template), template) == ["b\n</think>\nc<|im_end|>"]
    odd = conversation(("user", "a"), ("assistant", "<think>b</think>c"))
    assert learnt(encode(odd, template), template) == ["b</think>c<|im_end|>"]
    empty = conversation(("user", ""), ("assistant", ""))
    assert learnt(encode(empty, template), template) == ["<|im_end|>"]


def test_turns_of_a_prompt_are_not_learnt(template_of) -> None:
    prompt = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]}
    for name in (None, "nemotron_3_super", "qwen3"):
        template = template_of(name)
        assert learnt(encode(read_conversation(row, "f:1"), template), template)[-1:] == ["d<|im_end|>"]
        assert encode(read_conversation(row, "f:1"), template).mask.sum() == 2


def with_template(folder, source: str, tmp_path) -> ChatTemplate:
    Tokenizer.load(folder).save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(source)
    return ChatTemplate(Tokenizer.load(tmp_path))


MARKS = CHAT_ML.replace(
    "{{ message.content }}<|im_end|>\n", "{% generation %}{{ message.content }}{% endgeneration %}X"
)
REST = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
INSERTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think> </think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}" + REST
)


ALL_MARKED = CHAT_ML.replace("{% for", "{% generation %}{% for").replace("{% if", "{% endgeneration %}{% if")
TOO_FAR = (
    "{% for m in messages %}<|im_start|>{% generation %}{{ m.content }}<|im_end|>\nX{% endgeneration %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "mask", "kind"),
    [
        (MARKS.replace("X", "<|im_end|>\n"), "template", "mask without end"),
        (ALL_MARKED, "template", "whole mask"),
        (TOO_FAR, "template", "mask across a border"),
        ("{% generation %}{% endgeneration %}" + CHAT_ML, "template", "empty mask"),
        (INSERTS, "generated", "mask with an inserted thought"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "generated", "no end of turns"),
        ("{{ messages | map(attribute='content') | join }}" + CHAT_ML, "generated", "mask that cannot be told"),
        ("{{ raise_exception('no') }}", "generated", "refused by the chat template"),
    ],
)
def test_a_mask_that_cannot_be_meant_is_an_error(source, mask, kind, our_tokenizer, tmp_path) -> None:
    template = with_template(our_tokenizer, source, tmp_path)
    talk = conversation(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    with pytest.raises(ConversationError, match=r"^file\.jsonl:3: ") as error:
        encode(talk, template, mask)
    assert error.value.kind == kind


def test_marks_may_leave_the_end_to_generated(our_tokenizer, tmp_path) -> None:
    source = MARKS.replace("X", "<|im_end|>\n").replace(
        "{% generation %}", "{% if message.role == 'assistant' %}{% generation %}"
    )
    source = source.replace("{% endgeneration %}", "{% endgeneration %}{% else %}{{ message.content }}{% endif %}")
    template = with_template(our_tokenizer, source, tmp_path)
    talk = conversation(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert learnt(encode(talk, template), template) == ["b<|im_end|>", "d<|im_end|>"]


def test_an_end_that_only_the_last_turn_has_is_not_guessed(our_tokenizer, tmp_path) -> None:
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if loop.last %}</s>{% endif %}\n{% endfor %}"
    template = with_template(our_tokenizer, source, tmp_path)
    talk = conversation(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    with pytest.raises(ConversationError, match="does not tell"):
        encode(talk, template)
