"""`inspect` through the program: what it shows is what a training loop gets."""

import json
import random
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from app.__main__ import main
from app.commands.inspect import choose_rows
from datamodules.pretraining import PretrainingData
from datamodules.text.corpus import Corpus
from datamodules.text.preparation import Preparation, prepare_corpus
from modules.batch import PackedBatch, Window
from modules.errors import UserError
from tests.app.inspection.test_page import Page
from tests.modules.helpers import LocalStrategy, counts_of

ROWS, MICRO, LENGTH, STEPS = 6, 2, 64, 5
RUN_FILE = """\
name: shown
model:
  class_path: modules.pretraining.Pretraining
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
  class_path: datamodules.pretraining.PretrainingData
  init_args: {{path: {corpus}, sequence_length: 64, global_batch_size: 6, micro_batch_size: 2, total_tokens: 1920,
    validation_rows: 0}}
trainer: {{accelerator: cpu, devices: 1}}
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    generator = random.Random(3)
    for number in range(120):
        words = [generator.choice("def return naïve 日本 x <b> & 😀".split()) for _ in range(generator.randint(1, 40))]
        (folder / f"{number:03}.txt").write_text(" ".join(words) + f"\n{number}", encoding="utf-8")
    output = tmp_path_factory.mktemp("corpora") / "small"
    prepare_corpus(
        Preparation(paths=[str(folder)], output=output, sequence_length=LENGTH, vocab_size=400, workers=1, seed=1)
    )
    return output


@pytest.fixture(scope="module")
def run_file(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("run") / "run.yaml"
    file.write_text(RUN_FILE.format(corpus=corpus), encoding="utf-8")
    return file


class Recorder(pl.LightningModule):
    """Keeps the micro-batches that a training loop hands it."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[PackedBatch] = []

    def training_step(self, window: Window, index: int) -> None:
        self.seen += window.micro_batches

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def trained(corpus: Path) -> list[PackedBatch]:
    """The micro-batches of a whole run."""
    data = PretrainingData(
        path=str(corpus),
        sequence_length=LENGTH,
        global_batch_size=ROWS,
        micro_batch_size=MICRO,
        total_tokens=STEPS * ROWS * LENGTH,
        validation_rows=0,
    )
    module = Recorder()
    trainer = pl.Trainer(
        strategy=LocalStrategy(),
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=data)
    return module.seen


def expected_targets(batch: PackedBatch, row: int, depth: int) -> list[str]:
    """Targets by the definition, position by position, as the page writes them."""
    tokens, ids = batch.tokens[row].tolist(), batch.document_ids[row].tolist()
    padding = int(batch.document_ids[row, -1]) if not tokens[-1] else -1
    column = []
    for position in range(LENGTH):
        at = position + depth + 1
        same = at < LENGTH and len(set(ids[position : at + 1])) == 1 and ids[position] != padding
        column.append("" if same else "-")
    return column


@pytest.mark.parametrize("step", [1, 4])
def test_a_step_is_what_the_training_loop_gets(
    step: int,
    run_file: Path,
    corpus: Path,
    trained: list[PackedBatch],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    output = tmp_path / "page.html"
    assert main(["inspect", "--config", str(run_file), "--step", str(step), "--output", str(output)]) == 0
    page = Page(output.read_text(encoding="utf-8"))
    window = trained[(step - 1) * ROWS // MICRO : step * ROWS // MICRO]
    assert len(page.data["rows"]) == ROWS
    reader, tokenizer = Corpus(str(corpus)).rows("train"), Corpus(str(corpus)).tokenizer
    for number in range(ROWS):
        batch, place = window[number // MICRO], number % MICRO
        assert page.column(number, "ids") == [str(index) for index in batch.tokens[place].tolist()]
        for depth in range(3):
            assert page.column(number, "targets", depth) == expected_targets(batch, place, depth)
        # the source and row that are named hold these very tokens, documents and text
        heading = next(text for text in page.texts["p"] if f"micro-batch {number // MICRO}, row {place} in it" in text)
        origin = re.match(r"corpus row ([\d,]+), epoch 1;", heading)
        assert origin is not None
        tokens, lengths = reader.read(int(origin[1].replace(",", "")))
        assert tokens.tolist() == batch.tokens[place].tolist()
        start = 0
        for document, length in enumerate(lengths.tolist()):
            shown = page.documents[f"r{number}d{document}"]
            assert len(shown) == length
            text = "".join(part for kind, part in shown if "s" not in kind.split())
            text = re.sub(r"⟨[0-9A-F ]+⟩", "", text).replace("↵", "")
            ids = [index for index in tokens[start : start + length].tolist() if index >= 32]
            assert text == tokenizer.decode(ids)
            start += length
        assert f"r{number}d{len(lengths)}" not in page.documents or page.documents[f"r{number}d{len(lengths)}"] == []
    counts = sum(counts_of(batch, 2) for batch in window).tolist()
    printed = capsys.readouterr().out
    assert printed.startswith(f"Step {step} of 5 of run shown, on one device\n")
    assert f"next token {counts[0]:,}, MTP depth 1 {counts[1]:,}, MTP depth 2 {counts[2]:,}\n" in printed
    assert "no warnings" in printed
    assert f"{output}: 6 of 6 rows, " in printed


def test_rows_as_numbers_are_what_the_loss_is_made_of(
    run_file: Path, corpus: Path, trained: list[PackedBatch], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "rows.jsonl"
    assert main(["inspect", "--config", str(run_file), "--step", "2", "--output", str(output)]) == 0
    assert f"{output}: 6 of 6 rows, " in capsys.readouterr().out
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    window = trained[ROWS // MICRO : 2 * ROWS // MICRO]
    for key, name in (("token_ids", "tokens"), ("labels", "labels"), ("document_ids", "document_ids")):
        assert [row[key] for row in rows] == torch.cat([getattr(batch, name) for batch in window]).tolist()
    tokenizer = Corpus(str(corpus)).tokenizer
    targets = sum(label != -100 for row in rows for label in row["labels"])
    for row in rows:
        assert row["text"] == tokenizer.decode(row["token_ids"])
        assert re.fullmatch(r"corpus row [\d,]+, epoch 1", row["origin"])
        assert [weight > 0 for weight in row["loss_weights"]] == [label != -100 for label in row["labels"]]
    nats = torch.rand(ROWS, LENGTH)
    mean = sum(nats[r, t] for r in range(ROWS) for t in range(LENGTH) if rows[r]["labels"][t] != -100) / targets
    total = (torch.tensor([row["loss_weights"] for row in rows]) * nats).sum()
    torch.testing.assert_close(total, mean)
    assert main(["inspect", "--config", str(run_file), "--output", str(output), "--rows", "4,0"]) == 0
    assert len(output.read_text(encoding="utf-8").splitlines()) == 2


def test_the_terminal_shows_the_chosen_rows(run_file: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", "--config", str(run_file), "--rows", "4,0-1"]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"(?m)^row (\d+)  corpus row [\d,]+, epoch 1; micro-batch (\d), row (\d) in it", printed) == [
        ("4", "2", "0"),
        ("0", "0", "0"),
        ("1", "0", "1"),
    ]
    assert "3 of the 6 rows are not shown" in printed
    assert "\x1b" not in printed
    assert max(map(len, printed.splitlines())) <= 120
    assert main(["inspect", "--config", str(run_file), "--rows", "4,0-1"]) == 0
    assert capsys.readouterr().out == printed


def test_a_later_file_changes_a_key(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("data: {init_args: {micro_batch_size: 6}}\n", encoding="utf-8")
    assert main(["inspect", "--config", str(run_file), "--config", str(overlay), "--full", "true"]) == 0
    assert "6 of 64 positions, in 1 micro-batch\n" in capsys.readouterr().out


def save(batches: list[PackedBatch], file: Path, **fields: Any) -> None:
    content = {"step": 4, "rank": 0, "reason": "loss 9.5", "loss": 9.5, "gradient_norm": 3.0}
    torch.save(content | {"micro_batches": [batch.tensors() for batch in batches]} | fields, file)


def test_a_saved_batch_of_one_of_two_ranks(
    run_file: Path, trained: list[PackedBatch], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    whole = [row for batch in trained[9:12] for row in zip(*list(vars(batch).values())[:3], strict=True)]
    rows = [torch.stack(column) for column in zip(*whole[1::2], strict=True)]
    mine = PackedBatch(tokens=rows[0], labels=rows[1], document_ids=rows[2])
    file = tmp_path / "batch.pt"
    save([mine], file, rank=1)
    assert main(["inspect", "--config", str(run_file), "--batch", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        f"Step 4, rank 1, saved by the spike guard\nreason: loss 9.5\nloss 9.5000 (all its parts), "
        f"gradient norm 3.0000 before clipping\nfile: {file}\n"
    )
    saved_origins = re.findall(r"(?m)^row \d  (corpus row [\d,]+, epoch 1)", printed)
    assert main(["inspect", "--config", str(run_file), "--step", "4", "--rows", "all"]) == 0
    origins = re.findall(r"(?m)^row \d  (corpus row [\d,]+, epoch 1)", capsys.readouterr().out)
    assert saved_origins == origins[1::2]


def test_rows_of_another_run_have_no_origin(
    run_file: Path, trained: list[PackedBatch], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for step in (1, 999):
        save(trained[9:12], tmp_path / "batch.pt", step=step)
        assert main(["inspect", "--config", str(run_file), "--batch", str(tmp_path / "batch.pt")]) == 0
        printed = capsys.readouterr().out
        assert "row 0  micro-batch 0" in printed
        assert "no warnings" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--step", "6"], "--step: 6 is not in the run, which has steps 1 to 5"),
        (["--step", "0"], "--step: 0 is not in the run, which has steps 1 to 5"),
        (["--rows", "6"], "--rows: 6 is not in the batch, which has rows 0 to 5"),
        (["--rows", "some"], "--rows: 'some' is no list of rows like 0,3-5; or say all"),
        (["--step", "1", "--batch", __file__], "--step: --batch shows the step it was saved at"),
        (["--batch", "missing.pt"], "--batch: missing.pt: there is no such file"),
        (["--batch", __file__], "is no batch that the spike guard saved, or is damaged"),
        (["--rowz", "1"], "unknown option --rowz, did you mean --rows?"),
    ],
)
def test_mistakes_cost_one_line(options: list[str], message: str, run_file: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", "--config", str(run_file), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_a_missing_file_or_corpus_is_named(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", "--config", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "error: nowhere.yaml: there is no such file (--config)\n"
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("data: {init_args: {path: nowhere}}\n", encoding="utf-8")
    assert main(["inspect", "--config", str(run_file), "--config", str(overlay)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert "nowhere is no prepared corpus; make it with" in printed
    assert printed.count("\n") == 1


def test_a_run_is_as_long_as_max_steps(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("trainer: {max_steps: 2}\n", encoding="utf-8")
    assert main(["inspect", "--config", str(run_file), "--config", str(overlay), "--step", "3"]) == 2
    assert "which has steps 1 to 2" in capsys.readouterr().err
    assert main(["inspect", "--step=3", "--config", str(run_file), "--trainer.max_steps=2"]) == 2
    assert "which has steps 1 to 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "chosen"),
    [(None, [0, 1, 2]), ("all", [0, 1, 2, 3, 4]), ("3", [3]), (" 1, 3-4 ,1", [1, 3, 4]), ("4,0", [4, 0])],
)
def test_rows_are_chosen_in_the_order_given(text: str | None, chosen: list[int]):
    assert list(choose_rows(text, 5, 3)) == chosen


@pytest.mark.parametrize("text", ["", "1,", "-1", "2-1", "1-2-3", "0x1", "3-9", "5"])
def test_other_rows_are_refused(text: str):
    with pytest.raises(UserError, match=r"^--rows: "):
        choose_rows(text, 5, 3)
