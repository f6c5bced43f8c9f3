"""Held-out problems put to a scripted model."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from datamodules.conversations.template import ChatTemplate
from datamodules.environments.evaluation import MAX_TURNS, HeldOutProblems
from datamodules.environments.pool import Pool
from datamodules.tokenizer import Tokenizer
from modules.batch import Prompt, Reply
from tests.datamodules.environments.helpers import rogue

CALCULATOR = {"class_path": "datamodules.environments.calculator.Calculator", "init_args": {"digits": 2}}
TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls %}<tool_call>{{ call.function.arguments.a }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}<|im_start|>assistant
{% if enable_thinking | default(true) %}<think>
{% else %}<think></think>{% endif %}"""
CALL = (
    "<tool_call>\n<function=add>\n<parameter=a>\n{}\n</parameter>\n<parameter=b>\n{}\n</parameter>\n"
    "</function>\n</tool_call>"
)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool({"rogue": rogue(), "calculator": CALCULATOR}, seconds=2) as pool:
        yield pool


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    Tokenizer.train(["what is the question? right answer 0 1 2 add\n"] * 9, 300).save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return Tokenizer.load(tmp_path)


class Script:
    """A model that says what a function of the prompt's text says."""

    def __init__(self, tokenizer: Tokenizer, say) -> None:
        self.tokenizer, self.say = tokenizer, say
        self.prompts: list[list[str]] = []
        self.keys: list[tuple[int, ...]] = []

    def __call__(self, prompts: Sequence[Prompt]) -> list[Reply]:
        texts = [self.tokenizer.decode(prompt.tokens) for prompt in prompts]
        self.prompts.append(texts)
        self.keys += [prompt.key for prompt in prompts]
        end = self.tokenizer.encode("<|im_end|>", special_tokens=True)
        said = [self.say(text) for text in texts]
        return [
            (self.tokenizer.encode(text, special_tokens=True) + (end if ended else []), ended) for text, ended in said
        ]


def ask(pool: Pool, tokenizer: Tokenizer, say, **options):
    held_out, script = HeldOutProblems(pool, ChatTemplate(tokenizer), tokenizer), Script(tokenizer, say)
    return held_out.run(3, script, **options), script, held_out


def test_replies_are_judged_and_a_cut_one_is_no_answer(pool: Pool, tokenizer: Tokenizer):
    def say(text: str) -> tuple[str, bool]:
        return ("right", True) if "question" in text else ("12", False)

    found, script, held_out = ask(pool, tokenizer, say, thinking=False, samples=2)
    rewards = {name: [[a.judgement.reward for a in part] for part in parts] for name, parts in found.items()}
    assert rewards == {"rogue": [[1, 1]] * 3, "calculator": [[0, 0]] * 3}
    assert {a.judgement.reason for part in found["calculator"] for a in part} == {"cut before its end"}
    assert found["rogue"][0][0].dialogue == [{"role": "assistant", "content": "right"}]
    assert len(set(script.keys)) == len(script.keys) == 12
    assert all(text.endswith("assistant\n<think></think>") for text in script.prompts[0])
    assert [part[0].problem for part in found["rogue"]] == held_out.problems("rogue", 3)
    assert [part[0].problem for part in found["rogue"]] == pool.problems("rogue", 0, range(3), held_out=True)


@pytest.mark.parametrize(
    ("form", "reward"), [("so\n</think>{}", 1.0), ("{}", 0.0), ("{}</think>", 0.0), ("Answer: {}\n</think>no", 0.0)]
)
def test_a_thought_that_the_prompt_opens_belongs_to_the_reply(pool, tokenizer, form: str, reward: float):
    def say(text: str) -> tuple[str, bool]:
        terms = text.partition("What is ")[2].partition("?")[0].split(" + ")
        return form.format(sum(map(int, filter(None, terms)))), True

    found, script, _ = ask(pool, tokenizer, say)
    assert all(text.endswith("<think>\n") for text in script.prompts[0])
    for (attempt,) in found["calculator"]:
        assert attempt.reply == "<think>\n" + form.format(attempt.problem.answer)
        assert attempt.judgement.reward == reward
        assert "reasoning_content" in attempt.dialogue[0]


def test_a_tool_is_called_and_its_result_told(pool: Pool, tokenizer: Tokenizer):
    def say(text: str) -> tuple[str, bool]:
        result = text.rpartition("<|im_start|>tool\n")[2].partition("<|im_end|>")[0]
        if "question" in text or text.count("<|im_start|>tool"):
            return "right" if "question" in text else result, True
        a, b = text.partition("What is ")[2].partition("?")[0].split(" + ")
        return f"I add.\n{CALL.format(a, b)}", True

    found, script, _ = ask(pool, tokenizer, say, thinking=False)
    assert [len(texts) for texts in script.prompts] == [6, 3]
    for (attempt,) in found["calculator"]:
        assert attempt.judgement.reward == 1
        assert [turn["role"] for turn in attempt.dialogue] == ["assistant", "tool", "assistant"]
        assert attempt.dialogue[1]["content"] == attempt.problem.answer
        assert attempt.dialogue[0]["tool_calls"][0]["function"]["name"] == "add"


def test_an_environment_that_cannot_go_on_costs_its_dialogue_a_named_failure(tokenizer: Tokenizer):
    replies = iter(["raise", "mute", "none"])
    with Pool({"formless": rogue("Formless")}, seconds=2) as pool:
        found, script, _ = ask(pool, tokenizer, lambda _: (next(replies), True), thinking=False)
    failures = [attempt.judgement.failure for (attempt,) in found["formless"]]
    assert failures[0] == "KeyError: 'no such thing'"
    assert all("no list of turns" in failure for failure in failures[1:])
    assert len(script.prompts) == 1


def test_a_model_that_calls_for_ever_is_stopped(pool: Pool, tokenizer: Tokenizer):
    found, script, _ = ask(pool, tokenizer, lambda _: (CALL.format("x", 1), True), thinking=False)
    assert len(script.prompts) == MAX_TURNS
    (attempt,) = found["calculator"][0]
    assert attempt.judgement.reward == 0
    assert attempt.dialogue[1]["content"].startswith("error")
