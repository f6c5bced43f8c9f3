"""The command as a user starts it, on task files written here, against values worked out from transformers' model."""

import json
import math

import pytest
import torch

from tests.app.evaluation.tasks import QUESTIONS, TASKS, TEXTS, write_tasks
from tests.modules.checkpoints.helpers import made_comparable

OFFLINE = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def evaluate(program, models, tmp_path_factory):
    """Runs the command without a network, its caches in a folder of the test."""
    cache = str(tmp_path_factory.mktemp("cache"))

    def run(*args: object, model: str = "first"):
        environment = {**OFFLINE, "HF_HOME": cache, "HF_DATASETS_CACHE": cache}
        return program.run("evaluate", models[model], *args, environment=environment)

    return run


@pytest.fixture(scope="module")
def results(evaluate, tmp_path_factory):
    """JSON, samples and printed text of all tasks."""
    folder = tmp_path_factory.mktemp("evaluated")
    tasks, output, samples = write_tasks(folder / "tasks"), folder / "results.json", folder / "samples.jsonl"
    names = ",".join(f"tiny_{name}" for name in TASKS)
    result = evaluate("--tasks", names, "--tasks_path", tasks, "--output", output, "--details", samples)
    assert result.code == 0, result.output
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    return json.loads(output.read_text(encoding="utf-8")), rows, result.output


@pytest.fixture(scope="module")
def oracle(models):
    """Returns log-probability of a continuation after a context, and greedy tokens; tokenised by transformers."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(models["first"])
    network = made_comparable(transformers.NemotronHForCausalLM.from_pretrained(models["first"]))

    @torch.no_grad()
    def logits(ids: list[int]) -> torch.Tensor:
        return network(torch.tensor([ids]), use_cache=False).logits[0]

    def logprob(context: list[int], continuation: list[int]) -> float:
        table = logits(context + continuation).double().log_softmax(-1)
        return sum(float(table[len(context) - 1 + n, token]) for n, token in enumerate(continuation))

    def greedy(ids: list[int], count: int) -> list[int]:
        added: list[int] = []
        for _ in range(count):
            added.append(int(logits(ids + added)[-1].argmax()))
        return added

    return tokenizer, logprob, greedy


def test_multiple_choice(results, oracle) -> None:
    tokenizer, logprob, _ = oracle
    found, samples, _ = results
    right = 0
    for question, sample in zip(QUESTIONS, [row for row in samples if row["task"] == "tiny_choices"], strict=True):
        context = tokenizer(question["question"])["input_ids"]
        values = []
        for choice in question["choices"]:
            whole = tokenizer(f"{question['question']} {choice}")["input_ids"]
            values.append(logprob(context, whole[len(context) :]))
        assert [value for (value, _) in sample["filtered_resps"]] == pytest.approx(values, abs=1e-4)
        right += values.index(max(values)) == question["answer"]
    assert found["results"]["tiny_choices"]["acc,none"] == pytest.approx(right / 3)
    assert found["n-samples"]["tiny_choices"] == {"original": 3, "effective": 3}


def test_rolling_perplexity(results, oracle) -> None:
    tokenizer, logprob, _ = oracle
    total = sum(logprob([tokenizer.bos_token_id], tokenizer(row["text"])["input_ids"]) for row in TEXTS)
    size = sum(len(row["text"].encode()) for row in TEXTS)
    figures = results[0]["results"]["tiny_rolling"]
    assert figures["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), abs=1e-5)
    assert figures["byte_perplexity,none"] == pytest.approx(math.exp(-total / size), rel=1e-5)


def test_generation(results, oracle) -> None:
    tokenizer, _, greedy = oracle
    samples = [row for row in results[1] if row["task"] == "tiny_written"]
    for question, sample in zip(QUESTIONS, samples, strict=True):
        ids = greedy(tokenizer(question["question"])["input_ids"], 7)
        ids = ids[: ids.index(2)] if 2 in ids else ids
        text = tokenizer.decode(ids, skip_special_tokens=True).partition("o")[0]
        assert sample["resps"] == [[text]]


def test_the_table_the_samples_and_a_warning_are_printed(results) -> None:
    _, _, printed = results
    for text in (
        "Tasks     |Version|Filter",
        "tiny_rolling",
        "|bits_per_byte",
        "tiny_choices: 3 of 3 samples",
        "note: tiny_extracted: filter number found no answer in 3 of 3 completions",
        "note: tiny_extracted: exact_match is 0 for all 3 samples; the first completion is ",
    ):
        assert text in printed
    assert "note: tiny_choices" not in printed


def test_the_file_says_what_was_run(results, models) -> None:
    found, _, _ = results
    assert found["config"]["model"] == str(models["first"])
    assert found["config"]["prefix_token"] == "<s>"
    assert found["environment"].keys() >= {"lm-eval", "torch", "superbolt"}
    assert found["configs"]["tiny_choices"]["output_type"] == "multiple_choice"
    assert "samples" not in found


def test_limit_examples_and_chat_template(evaluate, tmp_path) -> None:
    shots = {**TASKS["written"], "fewshot_split": "test", "target_delimiter": " "}
    tasks, samples = write_tasks(tmp_path / "tasks", {"written": shots}), tmp_path / "samples.jsonl"
    options = (
        "--num_fewshot",
        "1",
        "--apply_chat_template",
        "true",
        "--system_instruction",
        "Write code.",
        "--limit",
        "2",
    )
    result = evaluate("--tasks", "tiny_*", "--tasks_path", tasks, "--details", samples, *options)
    assert result.code == 0, result.output
    assert "tiny_written: 2 of 3 samples" in result.output
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2
    prompt = rows[0]["arguments"][0][0]
    assert prompt.startswith("<|im_start|>system\nWrite code.<|im_end|>\n<|im_start|>user\n")
    assert prompt.count("<|im_start|>assistant\n") == 2
    assert prompt.endswith("<|im_start|>user\nimport os\nimport<|im_end|>\n<|im_start|>assistant\n<think>\n")


def test_mistakes_cost_one_line(evaluate, tmp_path) -> None:
    given = ("--tasks_path", write_tasks(tmp_path / "tasks"))
    for arguments, message in (
        (("--tasks", "tiny_choises", *given), "there is no task, group or tag tiny_choises; did you mean tiny_choices"),
        (("--tasks", "tiny_choices", *given, "--limit", "0"), "limit: 0 must be at least 1"),
        (("--tasks", "tiny_choices", *given, "--prefix_token", "ab"), "prefix_token: 'ab' is"),
    ):
        result = evaluate(*arguments)
        assert result.code == 2, result.output
        assert message in result.output
        assert result.output.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in result.output
