"""`inspect` of a run on conversations: rows as numbers against each conversation encoded by itself; broken masks."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from app.__main__ import main
from app.commands.inspect import StepLoader
from datamodules.conversations.masks import encode
from datamodules.conversations.messages import read_conversation
from datamodules.conversations.template import ChatTemplate
from datamodules.tokenizer import Tokenizer

RUN_FILE = """\
name: talk
model:
  class_path: modules.sft.SFT
  init_args:
    backbone:
      vocab_size: 512
      hidden_size: 32
      hybrid_override_pattern: "*-"
      num_attention_heads: 2
      num_key_value_heads: 1
      head_dim: 16
      intermediate_size: 64
      num_nextn_predict_layers: 1
      mtp_hybrid_override_pattern: "*-"
    mtp_depths: 2
    precision: {{recipe: fp32}}
    optimizer: {{learning_rate: 3.0e-3}}
    schedule: {{warmup_tokens: 0, decay_tokens: 0}}
data:
  class_path: datamodules.sft.SFTData
  init_args: {{sources: {{talk: {{path: {corpus}}}}}, sequence_length: 128, global_batch_size: 4, micro_batch_size: 2,
    total_tokens: 1024, validation_rows: 0}}
trainer: {{accelerator: cpu, devices: 1}}
"""
CONVERSATIONS = [
    {
        "messages": [
            {"role": "system", "content": "é <|im_end|>"},
            {"role": "user", "content": f"{number} + 1?"},
            {"role": "assistant", "content": f"{number + 1}", "reasoning_content": "I count."},
            {"role": "user", "content": "sure?"},
            {"role": "assistant", "content": number % 3 * "yes "},
        ],
        "weight": 1 + number % 2,
    }
    for number in range(40)
]


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("talk")
    file = folder / "talk.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in CONVERSATIONS), encoding="utf-8")
    Tokenizer.train([file.read_text(encoding="utf-8")], 400).save(folder / "tokenizer")
    command = ["prepare", str(file), "--output", str(folder / "corpus"), "--tokenizer", str(folder / "tokenizer")]
    assert main([*command, "--sequence_length", "128", "--workers", "1"]) == 0
    (folder / "run.yaml").write_text(RUN_FILE.format(corpus=folder / "corpus"), encoding="utf-8")
    return folder / "run.yaml"


def documents(row: dict) -> Iterator[tuple[slice, list[int]]]:
    """Place and tokens of each conversation of a row."""
    ids, start = row["document_ids"], 0
    while start < len(ids) and ids[start] < len(ids):
        end = start + ids.count(ids[start])
        yield slice(start, end), row["token_ids"][start:end]
        start = end


@pytest.mark.parametrize("average", ["tokens", "conversations"])
def test_rows_as_numbers(average: str, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.jsonl"
    key = f"--model.init_args.loss_average={average}"
    assert main(["inspect", "--config", str(run_file), "--step", "2", "--output", str(output), key]) == 0
    assert "no warnings" in capsys.readouterr().out
    tokenizer = Tokenizer.load(run_file.parent / "corpus" / "tokenizer")
    template, known = ChatTemplate(tokenizer), {}
    for row in CONVERSATIONS:
        encoded = encode(read_conversation(row, "here"), template)
        known[tuple(encoded.tokens.tolist())] = encoded.mask.tolist(), row["weight"]
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 4
    counts, weights = [], []
    for row in rows:
        assert row["text"] == tokenizer.decode(row["token_ids"])
        for place, tokens in documents(row):
            mask, weight = known[tuple(tokens)]
            targets = [token if learnt else -100 for token, learnt in zip(tokens[1:], mask[1:], strict=True)]
            assert row["labels"][place] == [*targets, -100]
            counts.append(sum(mask))
            share = 1 if average == "tokens" else 1 / counts[-1]
            weights.append([weight * share if label != -100 else 0 for label in row["labels"][place]])
    total = sum(map(sum, weights))
    given = [row["loss_weights"][place] for row in rows for place, _ in documents(row)]
    for mine, theirs in zip(weights, given, strict=True):
        torch.testing.assert_close(torch.tensor(theirs), torch.tensor([weight / total for weight in mine]))
    assert len(counts) > 4
    assert sum(sum(row["loss_weights"]) for row in rows) == pytest.approx(1)


def test_what_is_taught_stands_out(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--config", str(run_file), "--rows", "0"]) == 0
    printed = capsys.readouterr().out
    name = r"(?m)^    ⟦«<\|im_start\|>»system↵\n    .*é <\|im_end\|>«<\|im_end\|>»↵$"
    assert re.search(name, printed), "a name in a message is text"
    assert "«<think>»«</think>»⟧" in printed
    assert "weight 2, " in printed


def test_a_broken_mask_is_an_error(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = StepLoader.load

    def load(self, step):
        micro_batches = real(self, step)
        for batch, row in ((micro_batches[0], 1), (micro_batches[1], 0)):
            batch.labels[row, batch.document_ids[row] == batch.document_ids[row, 0]] = -100
        return micro_batches

    monkeypatch.setattr(StepLoader, "load", load)
    assert main(["inspect", "--config", str(run_file)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: row 1 (talk row ")
    assert ", conversation 0 from position 0: the mask is empty: nothing would be learnt (and 1 more); " in printed.err
    assert printed.err.count("\n") == 1
    assert "warning: row 2 (talk row " in printed.out
