"""The command as a user starts it: `python -m app prepare`."""

import glob
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.__main__ import main
from datamodules.tokenizer import Tokenizer
from modules.checkpoints import folder
from tests.app.commands.helpers import write_run
from tests.modules.checkpoints.folders import write_hf_folder
from tests.modules.helpers import make_network, tiny_config

ROOT = Path(__file__).parents[3]


def start(*args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "app", "prepare", *map(str, args)]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def run(*args: object) -> tuple[int, str, str]:
    process = start(*args)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def tree(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two megabytes in a thousand files, some JSONL, some bad."""
    folder = tmp_path_factory.mktemp("text")
    generator = random.Random(0)
    words = [f"{generator.choice('bcdfglmnprst')}{generator.choice('aeiou')}{n % 97}" for n in range(4000)]

    def document() -> str:
        return " ".join(generator.choices(words, k=int(generator.lognormvariate(5, 1)) + 1))

    lines = [json.dumps({"text": document()}) for _ in range(100)]
    (folder / "documents.jsonl").write_text("\n".join([*lines, "{broken", lines[0]]) + "\n")
    (folder / "code").mkdir()
    for number in range(1400):
        (folder / "code" / f"m{number}.py").write_text(f"# {document()}\n")
    (folder / "code" / "bad.md").write_bytes(b"bad \xff bytes")
    return folder


OPTIONS = ("--sequence_length", 128, "--vocab_size", 600, "--shard_bytes", 20_000, "--workers", 2)


def test_kill_9_again_and_again_and_the_result_is_the_same_to_the_byte(text: Path, tmp_path):
    code, out, err = run(text, "--output", tmp_path / "whole", *OPTIONS)
    assert (code, err) == (0, "")
    for line in ("documents", "1,501", "bytes a token", "not JSON", "duplicate", "replaced by U+FFFD", "fingerprint"):
        assert line in out
    expected = tree(tmp_path / "whole")
    output = tmp_path / "killed"
    generator = random.Random(1)
    kills = shards = 0
    while not (output / "corpus.json").exists():
        process = start(text, "--output", output, *OPTIONS)
        wanted = shards + generator.randint(1, 25)
        while process.poll() is None and shards < wanted:
            time.sleep(0.002)
            shards = len(glob.glob(f"{output}/.preparation/shard-*.json"))  # unlike Path.glob, a folder may vanish
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        assert kills < 100
    assert kills >= 3
    code, out, _ = run(text, "--output", output, *OPTIONS)
    assert code == 0
    assert tree(output) == expected


def test_a_finished_output_says_so_and_other_options_are_refused(text: Path, tmp_path):
    arguments = (text / "documents.jsonl", "--output", tmp_path / "out", "--sequence_length", 64, "--vocab_size", 300)
    assert run(*arguments)[0] == 0
    before = tree(tmp_path / "out")
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert "is complete already" in out
    code, out, err = run(*arguments, "--seed", 3)
    assert code == 2
    assert err.startswith("error: seed: ")
    assert err.count("\n") == 1
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "error: paths: nowhere does not exist"),
        (["one.txt"], "error: paths: 1 document of 1 bytes in all is too little"),
        (["bad.txt", "--encoding", "strict"], "bad.txt: byte 0 is not UTF-8"),
        (["one.txt", "--vocab_size", "10"], "error: vocab_size: 10 is too small"),
        (["one.txt", "--tokenizer", "nowhere"], "error: tokenizer: nowhere is not a folder"),
        (["one.txt", "--no_such_option", "1"], "no_such_option"),
        (["one.txt", "--encoding", "latin"], "encoding"),
    ],
)
def test_mistakes_cost_one_line_and_exit_code_2(arguments: list[str], message: str, tmp_path):
    (tmp_path / "one.txt").write_bytes(b"a")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    arguments[0] = str(tmp_path / arguments[0]) if arguments[0].endswith(".txt") else arguments[0]
    code, _, err = run(*arguments, "--output", tmp_path / "out")
    assert code == 2
    assert message in err
    assert err.count("\n") <= 3
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def write_tokenizer(path: Path) -> Path:
    Tokenizer.train(["What is it? It is."], 300).save(path)
    return path


def conversation(number: int) -> dict:
    asked = {"role": "user", "content": f"What is {number} + {number}?"}
    return {"messages": [asked, {"role": "assistant", "content": f"It is {2 * number}."}]}


def write_lines(file: Path, rows: list) -> Path:
    file.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return file


def test_conversations_are_known_by_their_first_row(tmp_path, capsys):
    rows = [conversation(number) for number in range(40)]
    source = write_lines(tmp_path / "rows.jsonl", [rows[0], "", *rows[1:]])
    own = write_tokenizer(tmp_path / "tokenizer")
    options = ["--tokenizer", str(own), "--sequence_length", "128", "--workers", "1"]
    assert main(["prepare", str(source), *options, "--output", str(tmp_path / "talk")]) == 0
    out = capsys.readouterr().out
    assert "the rows hold 'messages': taken as conversations (--kind text takes 'text' as text)" in out
    assert "conversations            40   (" in out
    assert "supervised" in out
    assert json.loads((tmp_path / "talk" / "corpus.json").read_text())["kind"] == "conversations"

    assert main(["prepare", str(source), *options, "--output", str(tmp_path / "talk"), "--kind", "conversations"]) == 0
    assert "is complete already" in capsys.readouterr().out
    assert main(["prepare", str(source), *options, "--output", str(tmp_path / "text"), "--kind", "text"]) == 2
    assert "no string under the key 'text'" in capsys.readouterr().err

    both = write_lines(tmp_path / "both.jsonl", [row | {"text": f"text {n}"} for n, row in enumerate(rows)])
    assert main(["prepare", str(both), *options, "--output", str(tmp_path / "both")]) == 0
    assert json.loads((tmp_path / "both" / "corpus.json").read_text())["kind"] == "text"


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([conversation(1), "{", conversation(2)], [], r"rows.jsonl:2: not JSON; mend it, or set on_error to skip"),
        (
            [conversation(1), {"messages": [{"role": "x", "content": ""}]}],
            [],
            r"rows.jsonl:2: turn 1 has the unknown role",
        ),
        (
            [conversation(1)] * 3,
            ["--text_key", "a"],
            "error: text_key: is an option of text, and the sources hold conv",
        ),
        (
            [{"text": "a"}],
            ["--mask", "template"],
            "error: mask: is an option of conversations, and the sources hold text",
        ),
        ([conversation(1)], ["--low_effort", "2"], "error: low_effort: 2.0 is no share, give 0 to 1"),
        ([conversation(1)], ["--over_long", "split"], "over_long"),
        ([conversation(1)], ["--template", "no.jinja"], "error: template: no.jinja cannot be read"),
    ],
)
def test_mistakes_with_conversations_cost_one_line(rows, options, message, tmp_path, capsys):
    source = write_lines(tmp_path / "rows.jsonl", rows)
    own = write_tokenizer(tmp_path / "tokenizer")
    output = str(tmp_path / "out")
    assert main(["prepare", str(source), "--tokenizer", str(own), "--workers", "1", "--output", output, *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") <= 3
    assert not (tmp_path / "out" / "corpus.json").exists()


def test_conversations_need_a_model(tmp_path, capsys):
    source = write_lines(tmp_path / "rows.jsonl", [conversation(1)])
    assert main(["prepare", str(source), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(
        "error: tokenizer: conversations need one with a chat template; give --tok"
    )
    assert not (tmp_path / "out").exists()


def test_help_explains_every_option():
    code, out, _ = run("--help")
    assert code == 0
    for option in ("output", "sequence_length", "encoding", "oversized", "workers"):
        assert f"--{option}" in out
    assert "default: 512" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "s3://bucket/mine"], "error: --output: s3://bucket/mine is a URL; give a path of this machine"),
        (
            ["--output", "OUT", "--upload", "https://host/mine"],
            "error: upload: https://host/mine is not a URL that",
        ),
        (["--output", "OUT", "--upload", "mine"], "error: upload: mine is not a URL that can be used here; give"),
    ],
)
def test_urls_in_the_wrong_place_are_refused_before_anything_is_read(
    options: list[str], message: str, tmp_path, capsys
):
    text = tmp_path / "a.txt"
    text.write_text("a")
    options = [option.replace("OUT", str(tmp_path / "out")) for option in options]
    assert main(["prepare", str(text), *options]) == 2
    assert capsys.readouterr().err.startswith(message)
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_the_tokenizer_of_a_run_a_checkpoint_a_corpus_or_a_model_is_taken(tmp_path, capsys):
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "row {n} of text"}}\n' for n in range(9)))
    options = [str(tmp_path / "texts.jsonl"), "--sequence_length", "16", "--workers", "1"]
    run = write_run(tmp_path / "run")
    checkpoint = folder.checkpoints(run / "checkpoints")[0]
    own = checkpoint / "tokenizer"
    assert main(["prepare", *options, "--tokenizer", str(own), "--output", str(tmp_path / "corpus")]) == 0
    model = write_hf_folder(tmp_path / "hf", make_network(tiny_config(vocab_size=290)))
    shutil.copytree(own, model, dirs_exist_ok=True)
    capsys.readouterr()
    for number, given in enumerate((run, checkpoint, tmp_path / "corpus", own, model)):
        output = tmp_path / f"out{number}"
        assert main(["prepare", *options, "--tokenizer", str(given), "--output", str(output)]) == 0
        assert tree(output / "tokenizer") == tree(own)
        told = {run: f"tokenizer of {checkpoint}\n", checkpoint: f"tokenizer of {checkpoint}\n"}.get(given, "")
        assert told in capsys.readouterr().out
    (tmp_path / "none" / "checkpoints").mkdir(parents=True)
    for given, message in ((tmp_path / "none", "has no complete checkpoint"), (tmp_path, "holds no tokenizer.json")):
        assert main(["prepare", *options, "--tokenizer", str(given), "--output", str(tmp_path / "no")]) == 2
        assert capsys.readouterr().err.startswith(f"error: tokenizer: {given} {message}")
