"""The command as a user starts it, against transformers on the same folder."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from app.__main__ import main
from datamodules.text.corpus import Corpus
from datamodules.text.preparation import Preparation, prepare_corpus
from datamodules.tokenizer import Tokenizer
from tests.app.models import TEXTS
from tests.modules.checkpoints.helpers import made_comparable

TALK = [{"role": "user", "content": "add"}, {"role": "assistant", "content": "def add(a, b)"}]
ROWS = [
    {"id": 0, "text": TEXTS[1]},
    {"id": 1, "prompt": "def add(a, b):\n    return", "completion": " a + b\n"},
    {"id": 2, "text": ""},
    {"id": 3, "messages": TALK},
    {"id": 4, "text": "x"},
    {"id": 5, "text": TEXTS[2] * 3, "note": {"kept": ["as", "it", None, "is \u00e4"]}},
    {"id": 6, "prompt": "import", "completion": "?", "completion_ids": [40, 41, 42]},
    {"id": 7, "token_ids": [33, 34, 35]},
]


def write_rows(file: Path, rows: list) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def oracle(models):
    """Tokenizer and float64 log-probabilities [T - 1, V] of a model, by transformers."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(models["first"])
    networks = {
        name: made_comparable(transformers.NemotronHForCausalLM.from_pretrained(models[name]))
        for name in ("first", "second")
    }

    @torch.no_grad()
    def logprobs(name: str, ids: list[int]) -> torch.Tensor:
        return networks[name](torch.tensor([ids]), use_cache=False).logits[0, :-1].double().log_softmax(-1)

    return tokenizer, logprobs


@pytest.fixture(scope="module")
def scored(program, models, tmp_path_factory):
    """Input, output, and what the command printed."""
    folder = tmp_path_factory.mktemp("scored")
    source, output = write_rows(folder / "in.jsonl", ROWS), folder / "out.jsonl"
    options = ("--reference", models["second"], "--batch_tokens", "48")
    result = program.run("score", models["first"], "--input", source, "--output", output, *options)
    assert result.code == 0, result.output
    return source, output, result.output


def test_rows_come_back_in_order_with_all_their_keys(scored, models) -> None:
    _, output, _ = scored
    for row, answer in zip(ROWS, read(output), strict=True):
        assert answer | row == answer
        added = {"token_ids", "logprobs", "kl", "tokenizer"} | (
            {"completion_start"} if answer["id"] in (1, 3, 6) else set()
        )
        assert answer.keys() == row.keys() | added
        assert answer["tokenizer"] == Tokenizer.load(models["first"]).fingerprint
        assert len(answer["logprobs"]) == len(answer["kl"]) == max(len(answer["token_ids"]) - 1, 0)


def test_log_probabilities_and_kl_equal_transformers(scored, oracle) -> None:
    _, logprobs = oracle
    for answer in read(scored[1]):
        ids = answer["token_ids"]
        if len(ids) < 2:
            continue
        first, second = logprobs("first", ids), logprobs("second", ids)
        expected = first[torch.arange(len(ids) - 1), ids[1:]]
        torch.testing.assert_close(torch.tensor(answer["logprobs"]).double(), expected, atol=1e-4, rtol=0)
        kl = (second.exp() * (second - first)).sum(-1)
        torch.testing.assert_close(torch.tensor(answer["kl"]).double(), kl, atol=1e-4, rtol=1e-4)


def test_tokens_are_those_of_transformers_tokenizer(scored, oracle) -> None:
    tokenizer, _ = oracle
    answers = read(scored[1])
    assert answers[0]["token_ids"] == tokenizer(ROWS[0]["text"])["input_ids"]
    prompt, completion = (tokenizer(ROWS[1][key])["input_ids"] for key in ("prompt", "completion"))
    assert answers[1]["token_ids"] == prompt + completion
    assert answers[1]["completion_start"] == len(prompt)
    asked = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nadd<|im_end|>\n<|im_start|>assistant\n<think></think>"
    asked, said = (tokenizer(text)["input_ids"] for text in (asked, "def add(a, b)<|im_end|>"))
    assert answers[3]["token_ids"] == asked + said
    assert answers[3]["completion_start"] == len(asked)
    assert answers[6]["token_ids"] == [*tokenizer("import")["input_ids"], 40, 41, 42]
    assert answers[7]["token_ids"] == ROWS[7]["token_ids"]


def test_the_last_line_is_about_completions_where_there_are_some(scored, oracle) -> None:
    tokenizer, logprobs = oracle
    total, bits, size, tokens, divergence = 0.0, 0.0, 0, 0, 0.0
    special = set(tokenizer.all_special_ids) | {10, 11}
    for answer in read(scored[1]):
        ids, start = answer["token_ids"], max(answer.get("completion_start", 1), 1)
        if len(ids) < 2:
            continue
        first, second = logprobs("first", ids), logprobs("second", ids)
        for position in range(start, len(ids)):
            row, other = first[position - 1], second[position - 1]
            total -= float(row[ids[position]])
            divergence += float((other.exp() * (other - row)).sum())
            tokens += 1
        counted = [index for index in ids[start:] if index not in special]
        size += sum(len(tokenizer.convert_ids_to_tokens(index)) for index in counted)  # one character a byte
    bits = total / math.log(2)
    _, output, printed = scored
    summary = json.loads(output.with_name("out.jsonl.run.json").read_text())["summary"]
    assert summary == pytest.approx(
        {
            "rows": len(ROWS),
            "tokens": tokens,
            "nll": total / tokens,
            "perplexity": math.exp(total / tokens),
            "bits_per_byte": bits / size,
            "kl": divergence / tokens,
        },
        rel=1e-5,
    )
    line = printed.strip().splitlines()[-1]
    names = ("rows", "tokens scored", "mean nll", "perplexity", "bits per byte", "mean KL")
    assert all(name in line for name in names)
    numbers = [float(number) for number in re.findall(r"[\d.]+", line)]
    assert numbers == pytest.approx(list(summary.values()), rel=1e-3)


def test_the_same_command_goes_on_where_it_stopped(scored, program, models, tmp_path) -> None:
    source, whole, printed = scored
    output, run = tmp_path / "out.jsonl", tmp_path / "out.jsonl.run.json"
    known = json.loads(whole.with_name("out.jsonl.run.json").read_text())
    lines = whole.read_bytes().splitlines(keepends=True)
    arguments = ("score", models["first"], "--input", source, "--output", output, "--reference", models["second"])
    for kept in (0, 1, 4, len(lines)):
        output.write_bytes(b"".join(lines[:kept]) + (lines[kept][:7] if kept < len(lines) else b""))
        run.write_text(json.dumps({**known, "summary": None}))
        result = program.run(*arguments, "--batch_tokens", "48")
        assert result.code == 0, result.output
        assert output.read_bytes() == whole.read_bytes()
        assert json.loads(run.read_text()) == known
    before = output.stat().st_mtime_ns
    result = program.run(*arguments)
    assert "is complete already" in result.output
    assert result.output.splitlines()[-1] == printed.splitlines()[-1]
    assert output.stat().st_mtime_ns == before


def test_bf16_is_near_and_another_answer(scored, program, models, tmp_path) -> None:
    output = tmp_path / "out.jsonl"
    arguments = ("score", models["first"], "--input", scored[0], "--output", output)
    assert program.run(*arguments, "--dtype", "bf16").code == 0
    assert "is complete already" in program.run(*arguments, "--dtype", "bfloat16").output
    exact, rough = (torch.tensor(read(file)[5]["logprobs"]) for file in (scored[1], output))
    assert 0 < (exact - rough).abs().max() < 0.5
    refused = program.run(*arguments)
    assert refused.code == 2
    assert "begun with dtype bf16, not auto" in refused.output


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"txt": "a"}, ":2: a row needs text, or prompt and completion, or messages; this one has txt"),
        ({"text": 1}, ":2: text must be a text"),
        ({"completion": "a"}, ":2: the row has no prompt"),
        ({"prompt": "a"}, ":2: a row needs text"),
        ({"token_ids": [1, 10**6]}, ":2: token_ids must be a list of token ids from 0 to"),
        ({"token_ids": [1], "completion_start": 2}, ":2: completion_start must be a position"),
        ({"prompt": "a", "completion_ids": [True]}, ":2: completion_ids must be a list of token ids"),
        ({"messages": TALK[:1]}, ":2: messages must end with the assistant's turn"),
        ({"messages": []}, ":2: messages must hold at least one turn"),
        ({"messages": "hello"}, ":2: messages must be a list of turns"),
        ({"messages": [{"role": "assistant", "content": None}]}, ":2: "),
    ],
)
def test_a_broken_row_costs_one_line_before_anything_is_written(program, models, tmp_path, row, message) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"text": "a"}, row])
    result = program.run("score", models["first"], "--input", source, "--output", tmp_path / "out.jsonl")
    assert result.code == 2
    assert message in result.output
    assert result.output.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_other_mistakes_cost_one_line(program, models, tmp_path) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", [{"text": "a"}]), tmp_path / "out.jsonl"
    given = ("--input", source, "--output", output)
    for arguments, message in (
        ((tmp_path / "nowhere", *given), "nowhere does not exist"),
        ((models["first"], "--input", tmp_path / "no.jsonl", "--output", output), "--input: "),
        ((models["first"], *given, "--reference", models["smaller"]), "reference: "),
        ((models["first"], *given, "--batch_tokens", "0"), "batch_tokens: 0 must be at least 1"),
        ((models["first"], *given, "--dtype", "fp8"), "dtype"),
    ):
        result = program.run("score", *arguments)
        assert result.code == 2, result.output
        assert message in result.output
        assert result.output.count("\n") == 1
    assert not output.exists()


FOREIGN = "0" * 64


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"token_ids": [33, 34]}, "token_ids"),
        ({"prompt": "a", "completion": "b", "completion_ids": [40]}, "completion_ids"),
        ({"prompt_ids": [40], "completion": "b"}, "prompt_ids"),
    ],
)
def test_ids_of_another_tokenizer_are_refused_by_score_and_generate(models, tmp_path, capsys, row, key) -> None:
    output = tmp_path / "out.jsonl"
    source = write_rows(tmp_path / "in.jsonl", [{"text": "a"}, {**row, "tokenizer": FOREIGN}])
    message = f"{source}:2: {key} were written by another tokenizer"
    assert main(["score", str(models["first"]), "--input", str(source), "--output", str(output)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    if key == "prompt_ids":
        prompts = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}, {**row, "tokenizer": FOREIGN}])
        arguments = ["generate", str(models["first"]), "--prompts", str(prompts), "--output", str(output)]
        assert main(arguments) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not output.exists()
    own = Tokenizer.load(models["first"]).fingerprint
    for mark in ({}, {"tokenizer": own}):
        write_rows(source, [{**row, **mark}])
        assert main(["score", str(models["first"]), "--input", str(source), "--output", str(output)]) == 0
        for file in (output, output.with_name("out.jsonl.run.json")):
            file.unlink()


def test_texts_that_say_tokenizer_are_scored_as_texts(models, tmp_path) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", [{"text": TEXTS[0], "tokenizer": FOREIGN}]), tmp_path / "out"
    assert main(["score", str(models["first"]), "--input", str(source), "--output", str(output)]) == 0
    assert read(output)[0]["tokenizer"] == Tokenizer.load(models["first"]).fingerprint


@pytest.fixture(scope="module")
def corpus(models, tmp_path_factory) -> Path:
    """A corpus of the first model's tokenizer, of which most is held out, in rows of several documents."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [{"text": f"{TEXTS[n % 3]}# {n}\n" * (n % 7 + 1)} for n in range(60)]
    write_rows(folder / "in.jsonl", texts)
    options = {"sequence_length": 32, "validation_fraction": 0.7, "tokenizer": models["first"], "workers": 1}
    prepare_corpus(Preparation(paths=[str(folder / "in.jsonl")], output=folder / "corpus", **options))
    return folder / "corpus"


def figures(line: str) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in re.findall(r"(mean nll|perplexity|bits per byte|mean KL|gzip -9:) ([\d.]+)", line)
    }


def test_a_corpus_is_scored_as_transformers_says(models, corpus, oracle, capsys) -> None:
    _, logprobs = oracle
    reader = Corpus(str(corpus)).rows("validation")
    documents = [ids for row in range(len(reader)) for ids in reader.documents(row)]
    assert len(documents) > len(reader) > 10
    scored = [logprobs("first", ids)[range(len(ids) - 1), ids[1:]] for ids in documents if len(ids) > 1]
    nats, tokens = float(torch.cat(scored).sum()), len(torch.cat(scored))
    sizes = Tokenizer.load(models["first"]).token_bytes()
    size = sum(int(sizes[ids[1:]].sum()) for ids in documents)
    assert main(["score", str(models["first"]), "--data", str(corpus), "--batch_tokens", "64"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"{len(reader):,} rows, {tokens:,} tokens scored, ")
    found = figures(line)
    assert found["mean nll"] == pytest.approx(-nats / tokens, abs=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(-nats / tokens), rel=1e-5)
    assert found["bits per byte"] == pytest.approx(-nats / math.log(2) / size, abs=1e-4)
    assert found["gzip -9:"] == pytest.approx(Corpus(str(corpus)).metadata["gzip_bits_per_byte"], abs=1e-4)


def test_some_rows_and_a_reference(models, corpus, capsys) -> None:
    arguments = ["score", str(models["first"]), "--data", str(corpus), "--validation_rows", "3"]
    assert main([*arguments, "--reference", str(models["second"])]) == 0
    found = figures(line := capsys.readouterr().out.splitlines()[-1])
    assert line.startswith("3 rows, ")
    assert found["mean KL"] > 0
    assert "gzip -9:" not in found, "that is of all rows"


def test_mistakes_with_a_corpus_cost_one_line(models, corpus, tmp_path, capsys) -> None:
    Tokenizer.train(["other texts altogether " * 9], 300).save(tmp_path / "other")
    options = {"sequence_length": 32, "tokenizer": tmp_path / "other", "workers": 1}
    texts = str(write_rows(tmp_path / "in.jsonl", [{"text": f"{n} words"} for n in range(9)]))
    prepare_corpus(Preparation(paths=[texts], output=tmp_path / "foreign", **options))
    options = options | {"tokenizer": models["first"], "validation_fraction": 0.0}
    prepare_corpus(Preparation(paths=[texts], output=tmp_path / "none", **options))
    for arguments, message in (
        ((), "--input: give either rows as --input FILE --output FILE, or a prepared corpus as --data FOLDER"),
        (("--data", corpus, "--input", texts), "--input: give either"),
        (("--data", corpus, "--output", tmp_path / "out"), "--output: it goes with --input"),
        (("--input", texts), "--output: it goes with --input"),
        (("--data", corpus, "--validation_rows", 0), "--validation_rows: 0 must be at least 1"),
        (("--input", texts, "--output", tmp_path / "out", "--validation_rows", 1), "--validation_rows: only --data"),
        (("--data", tmp_path / "nowhere"), f"--data: {tmp_path / 'nowhere'} is neither a file nor a folder that"),
        (("--data", texts), f"--data: {texts} is a file, not a folder that prepare wrote"),
        (("--data", tmp_path / "none"), f"--data: {tmp_path / 'none'} has no held-out rows"),
        (
            ("--data", tmp_path / "foreign"),
            f"--data: {tmp_path / 'foreign'} was prepared with another tokenizer than that of {models['first']}; "
            f"prepare its text with --tokenizer {models['first']} and another --output",
        ),
    ):
        assert main(["score", str(models["first"]), *map(str, arguments)]) == 2
        assert (error := capsys.readouterr().err).startswith(f"error: {message}")
        assert error.count("\n") == 1
