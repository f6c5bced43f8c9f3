import json
import os
import shutil
import signal
import sysconfig
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from datamodules.loader import ValidationLoader
from datamodules.pretraining import CorpusRef, Phase, PretrainingData
from datamodules.text.corpus import Corpus
from datamodules.text.preparation import prepare_corpus
from datamodules.tokenizer import Tokenizer
from modules.batch import PackedBatch, Progress, Window
from modules.errors import UserError
from tests.datamodules.conftest import small
from tests.modules.helpers import LocalStrategy


class Recorder(pl.LightningModule):
    """A module that writes down what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, int]] = []
        self.progress: list[Progress] = []
        self.validated: list[int] = []

    def training_step(self, window: Window, index: int) -> None:
        assert window.step == self.global_step + 1 == index + 1
        assert (window.samples, window.tokens) == (8, 8 * 64)
        self.seen += [(window.step, int(row.sum())) for batch in window.micro_batches for row in batch.tokens]
        self.progress.append(self.trainer.datamodule.progress)
        self.manual_backward(self.weight.square())
        self.optimizers().step()

    def validation_step(self, batch: PackedBatch, index: int) -> None:
        self.validated.append(int(batch.tokens.sum()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(pl.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def make_data(folder: Path, **options: Any) -> PretrainingData:
    defaults = {"sequence_length": 64, "global_batch_size": 8, "micro_batch_size": 2, "total_tokens": 10 * 8 * 64}
    return PretrainingData(path=str(folder), **(defaults | options))


def fit(data: PretrainingData, callbacks: list[pl.Callback] | None = None, checkpoint: Path | None = None) -> Recorder:
    module = Recorder()
    trainer = pl.Trainer(
        strategy=LocalStrategy(),
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        check_val_every_n_epoch=None,
        val_check_interval=5,
        num_sanity_val_steps=0,
        callbacks=callbacks,
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    assert trainer.global_step == 10
    return module


@pytest.fixture(scope="module")
def whole_run(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recorder, Path]:
    """A run of ten steps and its checkpoint after four."""
    checkpoint = tmp_path_factory.mktemp("run") / "four.ckpt"
    return fit(make_data(corpus_folder), [SaveAt(4, checkpoint)]), checkpoint


def test_a_run_has_its_steps_and_its_validation(whole_run: tuple[Recorder, Path], corpus_folder: Path):
    module, _ = whole_run
    assert [step for step, _ in module.seen] == [step + 1 for step in range(10) for _ in range(8)]
    assert module.progress == [Progress(steps=n, tokens=512 * n, samples=8 * n) for n in range(1, 11)]
    held_out = Corpus(str(corpus_folder)).rows("validation")
    batches = -(-len(held_out) // 2)
    assert len(module.validated) == 2 * batches
    assert module.validated[:batches] == module.validated[batches:]


@pytest.mark.parametrize(("micro", "workers"), [(2, 0), (2, 2), (4, 0), (1, 0)])
def test_a_resumed_run_sees_the_rest_for_any_micro_batch_and_workers(
    whole_run: tuple[Recorder, Path], corpus_folder: Path, micro: int, workers: int
):
    whole, checkpoint = whole_run
    data = make_data(corpus_folder, micro_batch_size=micro, workers=workers)
    resumed = fit(data, checkpoint=checkpoint)
    assert resumed.seen == whole.seen[4 * 8 :]
    assert resumed.progress == whole.progress[4:]
    assert len(resumed.validated) == 2 * len(data.val_dataloader())


def test_a_run_goes_on_only_with_the_same_tokens_in_a_step(whole_run: tuple[Recorder, Path], corpus_folder: Path):
    with pytest.raises(UserError, match=r"^data\.global_batch_size: a step of this run has 512 tokens, not 256; keep"):
        fit(make_data(corpus_folder, global_batch_size=4, total_tokens=10 * 4 * 64), checkpoint=whole_run[1])


def test_what_it_says_about_itself(corpus_folder: Path, documents: list[str]):
    data = make_data(corpus_folder, total_tokens=5000)
    assert data.total == Progress(steps=10, tokens=5120, samples=80)
    assert data.vocab_size == Corpus(str(corpus_folder)).metadata["tokenizer"]["vocab_size"] > 300
    assert data.token_bytes().dtype == torch.int64
    assert data.token_bytes().shape == (data.vocab_size,)
    assert data.decode(data.encode("def f</s>")) == "def f</s>"
    assert data.encode("</s>") == [2]
    assert data.decode(torch.tensor(data.encode("naïve"))) == "naïve"
    assert (data.tokenizer_folder / "tokenizer.json").is_file()
    assert data.gzip_bits_per_byte() == Corpus(str(corpus_folder)).metadata["gzip_bits_per_byte"]
    prompts = data.sample_prompts(3, 10)
    assert [len(prompt) for prompt in prompts] == [10] * 3
    assert all(any(text.startswith(data.decode(prompt)) for text in documents) for prompt in prompts)
    assert data.sample_prompts(1000, 10**6) == []


def test_validation_rows_are_a_fixed_number_taken_evenly(corpus_folder: Path):
    held_out = len(Corpus(str(corpus_folder)).rows("validation"))
    for wanted, expected in ((5, 5), (10**6, held_out), (None, held_out)):
        data = make_data(corpus_folder, validation_rows=wanted, micro_batch_size=1)
        data.setup("validate")
        loader = data.val_dataloader()
        assert isinstance(loader, ValidationLoader)
        batches = list(loader)
        assert len(batches) == expected
        assert len({batch.tokens.numpy().tobytes() for batch in batches}) == expected
    assert make_data(corpus_folder, validation_rows=0).val_dataloader() == []


@pytest.fixture(scope="module")
def second_folder(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus of other text with the same tokenizer."""
    folder = tmp_path_factory.mktemp("second")
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"other text {number} " * (number % 5 + 1))
    prepare_corpus(small(folder, folder / "corpus", tokenizer=corpus_folder / "tokenizer"))
    return folder / "corpus"


def test_sources_are_mixed_by_phase(corpus_folder: Path, second_folder: Path):
    data = make_data(
        corpus_folder,
        sources={"big": CorpusRef(path=str(corpus_folder)), "small": CorpusRef(path=str(second_folder))},
        phases=[Phase(sources={"big": 3, "small": 1}, until_tokens=6 * 512 - 100), Phase(sources={"small": 1})],
    )
    data.setup("fit")
    rows = {name: {row.tobytes() for row, _ in read_all(corpus)} for name, corpus in data.corpora.items()}
    for step in range(10):
        window = next(data.windows(step))
        found = [row.to(torch.int32).numpy().tobytes() for batch in window.micro_batches for row in batch.tokens]
        few = sum(row in rows["small"] for row in found)
        assert all(row in rows["big"] | rows["small"] for row in found)
        assert few == (2 if step < 6 else 8)
        consumed = data.consumed(step + 1)
        assert consumed["big"].rows == 6 * min(step + 1, 6)
        assert consumed["small"].rows == 2 * min(step + 1, 6) + 8 * max(0, step - 5)
    assert data.consumed(10)["small"].epochs > 1


def read_all(corpus: Corpus) -> list[tuple[np.ndarray, np.ndarray]]:
    reader = corpus.rows("train")
    return [reader.read(row) for row in range(len(reader))]


def test_the_default_corpus_is_prepared_where_it_is_missing(tmp_path, monkeypatch, capsys):
    library = tmp_path / "python"
    library.mkdir()
    for number in range(60):
        (library / f"m{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 9)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    data = PretrainingData(path=str(tmp_path / "data" / "stdlib"), sequence_length=32, total_tokens=100)
    data.prepare_data()
    data.setup("fit")
    assert data.corpora["corpus"].metadata["documents"] == 60
    assert "fingerprint" in capsys.readouterr().out
    data.prepare_data()
    assert "fingerprint" not in capsys.readouterr().out


def check(message: str, folder: Path, **options: Any) -> None:
    def start() -> None:
        data = make_data(folder, **options)
        data.prepare_data()
        data.setup("fit")

    with pytest.raises(UserError, match=message) as error:
        start()
    assert "\n" not in str(error.value)


def test_mistakes_name_the_key_and_the_mend(corpus_folder: Path, second_folder: Path, tmp_path):
    check(r"^data\.path: .*/nowhere is no prepared corpus; make it with: python -m app prepare", tmp_path / "nowhere")
    check(
        r"^data\.sequence_length: .* has rows of 64 tokens, not 128; set it to 64", corpus_folder, sequence_length=128
    )
    for key in ("sequence_length", "global_batch_size", "micro_batch_size", "total_tokens"):
        check(rf"^data\.{key}: 0 is not positive", corpus_folder, **{key: 0})
    for key in ("validation_rows", "workers"):
        check(rf"^data\.{key}: -1 is negative", corpus_folder, **{key: -1})
    mixed = {"a": CorpusRef(path=str(corpus_folder)), "b": CorpusRef(path=str(second_folder))}
    for phases, message in (
        ([], r"^data\.phases: give at least one"),
        ([Phase(sources={})], r"^data\.phases\[0\]\.sources: give at least one"),
        ([Phase(sources={"c": 1})], r"^data\.phases\[0\]\.sources: 'c' is not in data\.sources \(a, b\)"),
        ([Phase(sources={"a": 0})], r"^data\.phases\[0\]\.sources\.a: the weight 0 is not positive"),
        ([Phase(sources={"a": 1}, until_tokens=10)], r"^data\.phases\[0\]\.until_tokens: every phase but the last"),
        ([Phase(sources={"a": 1}), Phase(sources={"a": 1})], r"^data\.phases\[0\]\.until_tokens: every phase but"),
        (
            [Phase(sources={"a": 1}, until_tokens=n) for n in (9, 9)] + [Phase(sources={"a": 1})],
            r"^data\.phases\[1\]\.until_tokens: 9 is not after 9",
        ),
    ):
        check(message, corpus_folder, sources=mixed, phases=phases)
    check(r"^data\.sources: give at least one", corpus_folder, sources={})


def test_different_tokenizers_cannot_be_mixed(sources: Path, corpus_folder: Path, tmp_path):
    prepare_corpus(small(sources / "part2", tmp_path / "other"))
    mixed = {"a": CorpusRef(path=str(corpus_folder)), "b": CorpusRef(path=str(tmp_path / "other"))}
    check(
        r"^data\.sources: .*other and .* have different tokenizers; prepare .*--tokenizer", corpus_folder, sources=mixed
    )


def test_a_corpus_without_held_out_rows_needs_validation_switched_off(sources: Path, tmp_path):
    prepare_corpus(small(sources, tmp_path / "train_only", validation_fraction=0.0))
    check(r"^data\.validation_rows: no corpus has held-out rows", tmp_path / "train_only")
    data = make_data(tmp_path / "train_only", validation_rows=0)
    data.setup("fit")
    assert data.gzip_bits_per_byte() is None


def test_a_batch_that_does_not_divide_is_refused(corpus_folder: Path):
    check(
        r"^data\.init_args\.global_batch_size: 6 rows a step .*micro_batch_size to 3, or .* multiple of 4",
        corpus_folder,
        global_batch_size=6,
        micro_batch_size=4,
    )


def test_each_rank_takes_its_part_of_a_step(corpus_folder: Path):
    whole = make_data(corpus_folder)
    whole.setup("fit")
    expected = torch.cat([batch.tokens for batch in next(whole.windows(0)).micro_batches])
    parts = []
    for rank in range(2):
        data = make_data(corpus_folder)
        place = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": rank})
        data.trainer = SimpleNamespace(strategy=place)  # type: ignore[assignment]
        data.setup("fit")
        window = next(data.windows(0))
        assert len(window.micro_batches) == data.micro_batches == 2
        assert (window.tokens, window.samples) == (512, 8), "of all ranks"
        parts.append(torch.cat([batch.tokens for batch in window.micro_batches]))
    assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), expected)


def test_a_corrupt_chunk_stops_a_run_with_the_name_of_the_file(corpus_folder: Path, tmp_path):
    folder = Path(shutil.copytree(corpus_folder, tmp_path / "corpus"))
    for file in (folder / "train").glob("chunk-*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
        file.write_bytes(bytes(content))
    data = make_data(folder)
    data.setup("fit")
    with pytest.raises(UserError, match=r"train/chunk-\d+-0\.bin: row \d+ cannot be read"):
        list(data.train_dataloader())


def test_another_tokenizer_is_refused_by_the_key_of_the_data(corpus_folder: Path, tmp_path):
    Tokenizer.train(["another text altogether " * 9], 300).save(tmp_path / "model" / "tokenizer")
    same = Path(shutil.copytree(corpus_folder / "tokenizer", tmp_path / "same"))
    written = json.loads((same / "tokenizer.json").read_text())
    written["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (same / "tokenizer.json").write_text(json.dumps(written, indent=2))  # as transformers leaves it
    sources = {name: CorpusRef(path=str(corpus_folder)) for name in ("one", "two")}
    for key, data in (("path", make_data(corpus_folder)), ("sources", make_data(corpus_folder, sources=sources))):
        data.check_tokenizer(same, tmp_path / "model")
        message = f"data.init_args.{key}: {corpus_folder} has another tokenizer than {tmp_path / 'model'}, "
        with pytest.raises(UserError, match=f"^{message}.* --tokenizer {tmp_path / 'model'} and another --output$"):
            data.check_tokenizer(tmp_path / "model" / "tokenizer", tmp_path / "model")


def test_the_seed_changes_the_order_and_nothing_else(corpus_folder: Path):
    def epoch(seed: int) -> list[int]:
        data = make_data(corpus_folder, seed=seed)
        rows = data.mixture._orders[0].rows
        return [int(row) for step in range(-(-rows // 8)) for row in data.mixture.draw(step).row][:rows]

    orders = [epoch(seed) for seed in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == list(range(len(orders[0])))
    assert make_data(corpus_folder, seed=1).order != make_data(corpus_folder).order == make_data(corpus_folder).order


def test_workers_outlive_a_signal_to_the_whole_job(corpus_folder: Path):
    """A terminal and a scheduler send theirs to every process: the windows up to the end of the step still come."""
    data = make_data(corpus_folder, workers=2)
    data.setup("fit")
    expected = [window.step for window in make_data_windows(corpus_folder)]
    windows = data.windows(0)
    seen = [next(windows).step]
    for process in [*windows._workers, SimpleNamespace(pid=forkserver._forkserver._forkserver_pid)]:  # type: ignore[attr-defined]
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(process.pid, number)
    time.sleep(0.2)
    assert seen + [window.step for window in windows] == expected


def make_data_windows(corpus_folder: Path) -> list[Window]:
    data = make_data(corpus_folder)
    data.setup("fit")
    return list(data.windows(0))
