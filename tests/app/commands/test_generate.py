"""`generate` as a user starts it, against transformers' `generate` on the same folder."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from app.__main__ import main
from datamodules.conversations.template import ChatTemplate
from datamodules.tokenizer import Tokenizer
from modules.generation import native
from modules.generation.engine import Completion
from tests.app.helpers import ROOT
from tests.modules.checkpoints.helpers import made_comparable, their_model, write_fit_folder
from tests.modules.helpers import make_network, tiny_config

TEXTS = ["def add(a, b):\n    return a + b\n", "import os\n\nfor name in os.environ:\n    print(name, 'naïve')\n"]
ROWS = [
    {"prompt": "def add", "id": 1},
    {"prompt": "for name in", "id": 2, "extra": {"ü": [1, None]}},
    {"prompt": "i"},
    {"prompt": "import os\n\nfor name in os.environ:\n    print(", "completion": "is replaced"},
    {"prompt": "a literal </s> is no token"},
    {"prompt_ids": [35, 40, 45, 50]},
    {"messages": [{"role": "user", "content": "name?"}]},
]
SAMPLED = ["--temperature", "1.2", "--top_p", "0.9", "--samples", "2", "--batch_size", "3", "--max_new_tokens", "6"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("models") / "random"
    tokenizer = Tokenizer.train(TEXTS, 320)
    size = tokenizer.vocab_size + 3
    their_model(transformers, vocab_size=size, eos_token_id=[2, 5]).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", ROWS)


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def generate(model: Path, prompts: Path, output: Path, *options: str) -> list[dict]:
    assert main(["generate", str(model), "--prompts", str(prompts), "--output", str(output), *options]) == 0
    return read_rows(output)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """What transformers adds to each prompt, greedily, one prompt at a time."""
    import transformers

    theirs = made_comparable(transformers.NemotronHForCausalLM.from_pretrained(model))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    found = []
    for row in ROWS:
        if "messages" in row:
            ids = tokenizer.encode(
                "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nname?<|im_end|>\n<|im_start|>assistant\n<think>\n",
                add_special_tokens=False,
            )
        else:
            ids = row.get("prompt_ids") or tokenizer.encode(row["prompt"], split_special_tokens=True)
        with torch.no_grad():
            whole = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        found.append(whole[0, len(ids) :].tolist())
    return found


@pytest.mark.parametrize("options", [(), ("--batch_size", "2"), ("--batch_size", "1")], ids=str)
def test_greedy_completions_are_those_of_transformers(model, prompts, expected, tmp_path, options) -> None:
    rows = generate(model, prompts, tmp_path / "out.jsonl", "--max_new_tokens", "12", "--ignore_eos", "true", *options)
    tokenizer = Tokenizer.load(model)
    for row, given, ids in zip(rows, ROWS, expected, strict=True):
        assert row["completion_ids"] == ids
        assert row["completion"] == tokenizer.decode(ids)
        assert row["finish"] == "length"
        assert row["tokenizer"] == tokenizer.fingerprint
        assert ("message" in row) == ("messages" in given)
        added = {"completion", "completion_ids", "finish", "tokenizer", "message"}
        assert {key: value for key, value in row.items() if key not in added} == {
            key: value for key, value in given.items() if key not in added
        }
    assert len({tuple(row["completion_ids"]) for row in rows}) > 4


def test_end_of_text_and_stop_strings_end_a_completion(model, prompts, expected, tmp_path) -> None:
    tokenizer = Tokenizer.load(model)
    ended = tmp_path / "ended"
    shutil.copytree(model, ended)
    eos = [expected[0][4], expected[2][2]]
    (ended / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    rows = generate(ended, prompts, tmp_path / "eos.jsonl", "--max_new_tokens", "12")
    for row, ids in zip(rows, expected, strict=True):
        ends = [place for place, token in enumerate(ids) if token in eos]
        assert row["finish"] == ("eos" if ends else "length")
        assert row["completion_ids"] == ids[: ends[0] + 1 if ends else None]
        assert row["completion"] == tokenizer.decode(ids[: ends[0] if ends else None])
    stop = tokenizer.decode(expected[1][3:5])[:2]
    options = ("--max_new_tokens", "12", "--ignore_eos", "true", "--stop", stop, "--stop", "never there")
    rows = generate(model, prompts, tmp_path / "stop.jsonl", *options)
    for row, ids in zip(rows, expected, strict=True):
        text = tokenizer.decode(ids)
        assert row["completion"] == text.partition(stop)[0]
        assert row["finish"] == ("stop" if stop in text else "length")
    assert rows[1]["finish"] == "stop"


def test_what_a_row_draws_does_not_depend_on_its_batch(model, prompts, tmp_path) -> None:
    rows = generate(model, prompts, tmp_path / "a.jsonl", *SAMPLED)
    assert rows == generate(model, prompts, tmp_path / "b.jsonl", *SAMPLED, "--batch_size", "16")
    assert rows != generate(model, prompts, tmp_path / "c.jsonl", *SAMPLED, "--seed", "1")
    assert [row["sample"] for row in rows] == [0, 1] * len(ROWS)
    assert rows[0]["completion_ids"] != rows[1]["completion_ids"]


@pytest.mark.parametrize("lines", [0, 1, 5, 13])
@pytest.mark.parametrize("half", [b"", b'{"prompt": "def a'])
def test_a_killed_command_goes_on_to_the_same_bytes(model, prompts, tmp_path, lines: int, half: bytes, capsys) -> None:
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    generate(model, prompts, whole, *SAMPLED)
    generate(model, prompts, output, *SAMPLED)
    output.write_bytes(b"".join(output.read_bytes().splitlines(keepends=True)[:lines]) + half)
    capsys.readouterr()
    generate(model, prompts, output, *SAMPLED)
    assert output.read_bytes() == whole.read_bytes()
    tokens = sum(len(row["completion_ids"]) for row in read_rows(whole)[lines:])
    assert capsys.readouterr().err.startswith(f"{tokens} tokens in "), "what was there is not counted again"


def test_a_finished_file_is_left_alone(model, prompts, tmp_path, capsys) -> None:
    output = tmp_path / "out.jsonl"
    generate(model, prompts, output, *SAMPLED)
    capsys.readouterr()
    generate(model, prompts, output, *SAMPLED)
    assert "is complete already" in capsys.readouterr().out
    command = ["generate", str(model), "--prompts", str(prompts), "--output", str(output), *SAMPLED, "--top_k", "9"]
    assert main(command) == 2
    assert "was begun with top_k 0, not 9" in capsys.readouterr().err


def test_one_prompt_prints_its_completion(model, expected, capsys) -> None:
    options = ["--prompt", "def add", "--max_new_tokens", "12", "--ignore_eos", "true"]
    assert main(["generate", str(model), *options]) == 0
    printed = capsys.readouterr()
    assert printed.out == Tokenizer.load(model).decode(expected[0]) + "\n"
    assert printed.err.startswith("12 tokens in ")
    assert main(["generate", str(model), *options, "--samples", "2", "--temperature", "1"]) == 0
    assert capsys.readouterr().out.count("--- sample ") == 2


def test_prompts_come_from_standard_input_and_completions_go_to_standard_output(model, prompts, tmp_path) -> None:
    rows = generate(model, prompts, tmp_path / "out.jsonl", "--max_new_tokens", "5")
    command = [sys.executable, "-m", "app", "generate", str(model), "--max_new_tokens", "5", "--prompts", "-"]
    with prompts.open() as stdin:
        result = subprocess.run(command, stdin=stdin, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert [json.loads(line) for line in result.stdout.splitlines()] == rows, result.stderr
    assert "tokens/s" in result.stderr


def test_the_text_of_standard_input_is_a_prompt(model, monkeypatch, capsys) -> None:
    options = ["--max_new_tokens", "5", "--ignore_eos"]
    assert main(["generate", str(model), "--prompt", "def add", *options]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("def add\n"))
    assert main(["generate", str(model), "--prompt", "-", *options]) == 0
    assert capsys.readouterr().out == expected


def test_a_terminal_gets_the_text_in_pieces(model, expected, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    pieces: list[str] = []
    monkeypatch.setattr("app.options.print", lambda text, end, flush: pieces.append(text), raising=False)
    options = ["--prompt", "def add", "--max_new_tokens", "12", "--ignore_eos", "true"]
    assert main(["generate", str(model), *options]) == 0
    assert len(pieces) > 3
    text = Tokenizer.load(model).decode(expected[0]) + "\n"
    assert "".join(pieces) == "".join(
        c if c in "\n\t" or (c >= " " and not "\x7f" <= c < "\xa0") else "�" for c in text
    )


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}}
CALL = "<tool_call>\n<function=add>\n<parameter=a>\n3\n</parameter>\n</function>\n</tool_call>\n"


def scripted(monkeypatch, model: Path, text: str) -> list[list[int]]:
    """Let the model complete everything by one text; return the prompts."""
    asked: list[list[int]] = []

    def complete(network, requests, sampling, *, first=0, on_text=None, **_):
        for number, request in enumerate(requests[first:], first):
            asked.append(request.tokens)
            if on_text is not None:
                on_text(number, text[:7])
                on_text(number, text[7:])
            yield Completion(tokens=[3], text=text, logprobs=[], finish="eos", accepted=[])

    monkeypatch.setattr("modules.generation.engine.generate", complete)
    return asked


@pytest.mark.parametrize("colour", [False, True])
def test_a_question_goes_through_the_template(model, monkeypatch, capsys, colour: bool) -> None:
    asked = scripted(monkeypatch, model, "hm\n</think>\nfour")
    monkeypatch.setattr("sys.stdout.isatty", lambda: colour)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert main(["generate", str(model), "--user", "2+2? </s>", "--system", "short", "--low_effort"]) == 0
    printed = capsys.readouterr().out
    shown = "\x1b[2m<think>\nhm\n\x1b[0m\x1b[2m</think>\x1b[0m\nfour\n"
    assert printed == (shown if colour else "<think>\nhm\n</think>\nfour\n")
    template = ChatTemplate(Tokenizer.load(model))
    messages = [{"role": "system", "content": "short"}, {"role": "user", "content": "2+2? </s>"}]
    assert asked == [template.encode_prompt(messages, low_effort=True)]
    assert 2 not in asked[0], "what a user types is text"


def test_rows_of_messages_get_the_turn_as_a_message(model, tmp_path, monkeypatch) -> None:
    asked = scripted(monkeypatch, model, "hm\n</think>\n" + CALL)
    messages = [{"role": "user", "content": "3+4?"}]
    rows = [{"messages": messages, "tools": [TOOL]}, {"messages": messages}, {"messages": messages, "prompt": "3+"}]
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([TOOL["function"]]))
    file = write_rows(tmp_path / "rows.jsonl", rows)
    first, second, third = generate(model, file, tmp_path / "out.jsonl", "--tools", str(tools))
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}
    expected = {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call]}
    assert first["message"] == second["message"] == expected
    assert first["completion"] == "hm\n</think>\n" + CALL
    assert "message" not in third
    template = ChatTemplate(Tokenizer.load(model))
    given = [template.encode_prompt(messages, [TOOL]), template.encode_prompt(messages, [TOOL["function"]])]
    assert asked == [*given, Tokenizer.load(model).encode("3+")]
    whole = template.encode([*messages, first["message"]], answer=False, tools=[TOOL])
    assert whole[: len(given[0])] == given[0], "the message can be gone on from"
    assert generate(model, file, tmp_path / "off.jsonl", "--thinking", "false")[0]["message"] == expected
    assert asked[3] == template.encode_prompt(messages, [TOOL], enable_thinking=False)


def test_a_model_without_a_tokenizer_takes_token_ids(model, expected, tmp_path, capsys) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    prompts = write_rows(tmp_path / "ids.jsonl", [ROWS[5]])
    (row,) = generate(bare, prompts, tmp_path / "out.jsonl", "--max_new_tokens", "12", "--ignore_eos", "true")
    assert row["completion_ids"] == expected[5]
    assert row["completion"] is None
    assert main(["generate", str(bare), "--prompt", "text"]) == 2
    assert "brings no tokenizer" in capsys.readouterr().err


def test_drafts_and_half_precision_states(tmp_path, capsys) -> None:
    tokenizer = Tokenizer.train(TEXTS, 320)
    model = tmp_path / "fit"
    write_fit_folder(model, make_network(tiny_config(vocab_size=tokenizer.vocab_size)))
    plain = write_rows(
        tmp_path / "ids.jsonl", [{"prompt_ids": tokenizer.encode(text)} for text in ("def", "import os")]
    )
    rows = generate(model, plain, tmp_path / "plain.jsonl")
    assert capsys.readouterr().err.count("speculative") == 0
    assert generate(model, plain, tmp_path / "drafted.jsonl", "--draft_tokens", "3") == rows
    assert "speculative decoding: " in capsys.readouterr().err
    half = generate(model, plain, tmp_path / "half.jsonl", "--state_dtype", "fp16")
    assert half == generate(model, plain, tmp_path / "again.jsonl", "--state_dtype", "float16")
    assert half[0]["completion_ids"][:2] == rows[0]["completion_ids"][:2]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"prompt": "a"}', '{"prompt": '], ":2: not JSON"),
        (['{"prompt": "a"}', "", '["a"]'], ":3: not a JSON object"),
        (['{"text": "a"}'], ":1: the row has no prompt"),
        (['{"prompt": "a"}', '{"prompt": ""}'], ":2: the prompt is empty"),
        (['{"prompt": 5}'], ":1: prompt must be a text"),
        (['{"prompt_ids": [1, 100000]}'], ":1: prompt_ids must be a list of token ids"),
        (['{"messages": []}'], ":1: messages must hold at least one turn"),
        ([], ": the file has no rows"),
    ],
)
def test_a_broken_row_is_named_before_anything_is_written(model, tmp_path, lines, message: str, capsys) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(lines))
    assert main(["generate", str(model), "--prompts", str(file), "--output", str(tmp_path / "out.jsonl")]) == 2
    assert f"error: {file}{message}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--prompt: give either"),
        (["--prompt", "a", "--prompts", __file__], "--prompt: give either"),
        (["--prompts", "b"], "--prompts: b: there is no such file"),
        (["--prompt", "a", "--output", "b"], "--output: "),
        (["--prompt", "a", "--samples", "0"], "--samples: 0 must be at least 1"),
        (["--prompt", "a", "--max_new_tokens", "0"], "--max_new_tokens: 0 must be at least 1"),
        (["--prompt", "a", "--batch_size", "0"], "--batch_size: 0 must be at least 1"),
        (["--prompt", "a", "--draft_tokens", "-1"], "--draft_tokens: -1 must be at least 0"),
        (["--prompt", "a", "--stop", ""], "--stop: a stop string is empty"),
        (["--prompt", "a", "--stop", "\udcff"], "--stop: the text is not UTF-8"),
        (["--prompt", "\udcff"], "--prompt: the text is not UTF-8"),
        (
            ["--prompt", "a", "--dtype", "fp16"],
            "--dtype: expected one of auto, fp32, float32, bf16, bfloat16, got fp16",
        ),
        (["--prompt", "a", "--temperature", "-1"], "temperature: -1.0 must be"),
        (["--prompt", "a", "--top_p", "0"], "top_p: 0.0 must be"),
        (["--prompt", "a", "--draft_tokens", "2"], "draft_tokens: this model has no MTP block"),
        (["--prompt", ""], "--prompt: the prompt is empty"),
        (["--prompt", "a", "--temprature", "1"], "unknown option --temprature, did you mean --temperature?"),
        (["--prompts", "missing.jsonl", "--output", "b"], "--prompts: missing.jsonl: there is no such file"),
    ],
)
def test_mistakes_cost_one_line(model, options: list[str], message: str, capsys) -> None:
    assert main(["generate", str(model), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_without_the_c_code_it_is_said_that_decoding_is_slow(model, monkeypatch, capsys) -> None:
    monkeypatch.setattr(native, "load", lambda: (None, "no C compiler"))
    assert main(["generate", str(model), "--prompt", "import", "--max_new_tokens", "3", "--device", "cpu"]) == 0
    assert "slower than in C: no C compiler" in capsys.readouterr().err
