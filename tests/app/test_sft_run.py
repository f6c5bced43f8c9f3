"""From a file of conversations to a model that answers: the real program, on conversations that it learns by heart."""

import io
import json
from pathlib import Path

import pytest

from app.__main__ import main
from datamodules.tokenizer import Tokenizer
from tests.app.helpers import scalars

FACTS = {"apple": "red", "sky": "blue", "snow": "white", "grass": "green"}
STEPS = 60
RUN_FILE = """\
name: run
model:
  class_path: modules.sft.SFT
  init_args:
    backbone:
      vocab_size: 400
      hidden_size: 64
      hybrid_override_pattern: "M*-"
      num_attention_heads: 2
      num_key_value_heads: 1
      head_dim: 32
      intermediate_size: 128
      mamba_num_heads: 2
      mamba_head_dim: 64
      ssm_state_size: 16
      n_groups: 1
      chunk_size: 32
    mtp_depths: 0
    loss_average: conversations
    precision: {{recipe: fp32}}
    optimizer: {{learning_rate: 1.0e-2}}
    schedule: {{warmup_tokens: 512, decay_tokens: 2048}}
data:
  class_path: datamodules.sft.SFTData
  init_args:
    sources: {{facts: {{path: {folder}/facts, conversations: [{folder}/facts.jsonl]}}}}
    tokenizer: {folder}/tokenizer
    sequence_length: 128
    global_batch_size: 2
    micro_batch_size: 1
    total_tokens: {tokens}
    validation_fraction: 0.0
    validation_rows: 0
trainer: {{accelerator: cpu, devices: 1, default_root_dir: {folder}/runs}}
mock_step: {{enabled: false}}
"""


def conversation(thing: str, colour: str, thoughts: str | None) -> str:
    answer = {"role": "assistant", "content": colour} | ({"reasoning_content": thoughts} if thoughts else {})
    return json.dumps({"messages": [{"role": "user", "content": f"{thing}?"}, answer]})


@pytest.fixture(scope="module")
def folder(program, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("facts")
    rows = [conversation(*fact, thoughts) for fact in FACTS.items() for thoughts in (None, f"The {fact[0]}.")]
    (folder / "facts.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    Tokenizer.train(rows, 400).save(folder / "tokenizer")
    (folder / "run.yaml").write_text(RUN_FILE.format(folder=folder, tokens=STEPS * 2 * 128), encoding="utf-8")
    result = program.run("fit", f"--config={folder / 'run.yaml'}")
    assert result.code == 0, result.output
    assert "--- sample" not in result.output, "conversations have no beginnings to go on with"
    assert scalars(folder / "runs" / "run", values=True)["training/loss"][-1] < 0.1
    return folder


def chat(folder: Path, monkeypatch, capsys, *options: str) -> tuple[str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{thing}?\n/reset\n" for thing in FACTS)))
    assert main(["chat", str(folder / "runs" / "run"), "--temperature", "0", *options]) == 0
    printed = capsys.readouterr()
    return printed.out, printed.err


def test_it_answers(folder: Path, monkeypatch, capsys) -> None:
    plain, notes = chat(folder, monkeypatch, capsys, "--thinking", "false")
    assert plain == "".join(f"{colour}\n" for colour in FACTS.values())
    assert "never taught" not in notes
    thought, _ = chat(folder, monkeypatch, capsys)
    assert thought == "".join(f"<think>\nThe {thing}.\n</think>\n{colour}\n" for thing, colour in FACTS.items())


def test_it_completes(folder: Path, tmp_path: Path, capsys) -> None:
    model = str(folder / "runs" / "run")
    assert main(["generate", model, "--user", "sky?"]) == 0
    assert capsys.readouterr().out == "<think>\nThe sky.\n</think>\nblue\n"
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "snow?"}]}\n')
    assert main(["generate", model, "--prompts", str(rows), "--output", str(output)]) == 0
    message = {"role": "assistant", "content": "white", "reasoning_content": "The snow."}
    assert json.loads(output.read_text(encoding="utf-8"))["message"] == message


def test_what_it_learns_can_be_seen(folder: Path, capsys) -> None:
    assert main(["inspect", "--config", str(folder / "run.yaml"), "--rows", "all", "--full"]) == 0
    printed = capsys.readouterr().out
    assert "no warnings" in printed
    assert "«<think>»↵\n    ⟧The " in printed, "a thought that the prompt opens is learnt from its first word"
    assert "«<think>»«</think>»⟧" in printed, "an inserted one is not learnt"
