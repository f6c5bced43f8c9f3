import subprocess
import sys
from pathlib import Path

import pytest
import torch

from datamodules.corpus import Corpus, RowReader
from datamodules.loader import Placement, TrainingLoader, ValidationLoader, Windows, build_batch
from datamodules.mixture import Mixture, Stage
from modules.batch import IGNORED_LABEL, PackedBatch

STEPS = 12


@pytest.fixture(scope="module")
def reader(corpus_folder: Path) -> RowReader:
    return Corpus(str(corpus_folder)).rows("train")


def make_loader(reader: RowReader, ranks: int = 1, rank: int = 0, micro: int = 2, workers: int = 0) -> TrainingLoader:
    stages = [Stage(end_step=STEPS, weights={"a": 1.0})]
    mixture = Mixture({"a": reader.chunk_rows}, stages, rows_per_step=8, seed=5)
    placement = Placement(rank=rank, ranks=ranks, micro_batch_size=micro, depths=2)
    return TrainingLoader(Windows(mixture, [reader], placement), STEPS, 8 // (micro * ranks), workers, lambda _: None)


def same(a: PackedBatch, b: PackedBatch) -> bool:
    return all(torch.equal(value, getattr(b, name)) for name, value in a.tensors().items())


def naive_labels(tokens: list[int], lengths: list[int]) -> list[int]:
    labels = []
    position = 0
    for length in lengths:
        labels += [*tokens[position + 1 : position + length], IGNORED_LABEL]
        position += length
    return labels + [IGNORED_LABEL] * (len(tokens) - position)


def test_a_batch_has_the_labels_documents_and_counts_of_its_rows(reader: RowReader):
    rows = [reader.read(n) for n in range(len(reader))]
    used = [int(lengths.sum()) for _, lengths in rows]
    assert min(used) < 64 == max(used)
    batch = build_batch(rows, missing=2, depths=2)
    assert batch.tokens.dtype == batch.labels.dtype == batch.counts.dtype == torch.int64
    assert batch.document_ids.dtype == torch.int32
    assert batch.tokens.shape == batch.labels.shape == batch.document_ids.shape == (len(rows) + 2, 64)
    counts = [0, 0, 0]
    for number, (tokens, lengths) in enumerate(rows):
        sizes = lengths.tolist()
        assert batch.tokens[number].tolist() == tokens.tolist()
        assert batch.labels[number].tolist() == naive_labels(tokens.tolist(), sizes)
        documents = [document for document, size in enumerate(sizes) for _ in range(size)]
        padding = [64] * (64 - sum(sizes))
        assert batch.document_ids[number].tolist() == documents + padding
        for size in sizes:
            for depth in range(3):
                counts[depth] += max(0, size - 1 - depth)
    assert batch.counts.tolist() == counts
    assert batch.text_positions.item() == sum(used)
    assert (batch.labels[-2:] == IGNORED_LABEL).all()


def test_a_window_carries_its_counts_in_every_micro_batch(reader: RowReader):
    batches = list(make_loader(reader))
    assert len(batches) == len(make_loader(reader)) == STEPS * 4
    for step in range(STEPS):
        window = batches[4 * step : 4 * step + 4]
        total = sum((batch.labels != IGNORED_LABEL).sum() for batch in window)
        for batch in window:
            assert batch.counts[0] == total
            assert batch.counts.tolist() == window[0].counts.tolist()
            assert batch.counts.shape == (3,)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 8), (1, 1), (2, 2), (4, 1), (8, 1)])
def test_a_step_has_the_same_rows_for_any_ranks_and_micro_batches(reader: RowReader, ranks: int, micro: int):
    expected = [batch.tokens for batch in make_loader(reader, micro=8)]
    loaders = [list(make_loader(reader, ranks, rank, micro)) for rank in range(ranks)]
    per_step = 8 // (ranks * micro)
    for step in range(STEPS):
        found = [torch.cat([b.tokens for b in batches[per_step * step : per_step * (step + 1)]]) for batches in loaders]
        joined = torch.stack(found, dim=1).flatten(0, 1)  # rank r has rows r, r + R, ...
        assert torch.equal(joined, expected[step])


def test_two_workers_give_the_batches_and_states_of_none(reader: RowReader):
    plain, parallel = make_loader(reader), make_loader(reader, workers=2)
    for a, b in zip(plain, parallel, strict=True):
        assert same(a, b)
        assert plain.state_dict() == parallel.state_dict()
    resumed = make_loader(reader, workers=2)
    resumed.load_state_dict({"steps": 9})
    assert all(same(a, b) for a, b in zip(list(make_loader(reader))[36:], resumed, strict=True))


def test_the_state_counts_complete_windows_and_continues_after_them(reader: RowReader):
    batches = list(make_loader(reader))
    for consumed in range(0, STEPS * 4, 3):
        loader = make_loader(reader)
        for _, _batch in zip(range(consumed), loader, strict=False):
            pass
        assert loader.state_dict() == {"steps": consumed // 4}
        resumed = make_loader(reader)
        resumed.load_state_dict(loader.state_dict())
        rest = list(resumed)
        assert len(rest) == len(batches) - consumed // 4 * 4
        assert all(same(a, b) for a, b in zip(rest, batches[consumed // 4 * 4 :], strict=True))


def test_iterating_leaves_the_global_generator_alone(reader: RowReader):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    next(iter(make_loader(reader)))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("ranks", "micro", "count"), [(1, 4, 10), (2, 4, 9), (4, 2, 9), (2, 2, 1), (3, 1, 3)])
def test_validation_has_equal_batches_everywhere_and_every_row_once(
    reader: RowReader, ranks: int, micro: int, count: int
):
    rows = [(0, n) for n in range(count)]
    loaders = [
        ValidationLoader([reader], rows, Placement(rank=rank, ranks=ranks, micro_batch_size=micro, depths=1))
        for rank in range(ranks)
    ]
    batches = [list(loader) for loader in loaders]
    assert {len(of_rank) for of_rank in batches} == {-(-count // (ranks * micro))} == {len(loaders[0])}
    seen = []
    total = 0
    for batch in (batch for of_rank in batches for batch in of_rank):
        assert batch.tokens.shape == (micro, 64)
        assert batch.counts[0] == (batch.labels != IGNORED_LABEL).sum()
        total += int(batch.counts[0])
        seen += [row.tolist() for row, labels in zip(batch.tokens, batch.labels, strict=True) if labels.max() >= 0]
    whole = build_batch([reader.read(n) for _, n in rows], 0, 1)
    assert total == whole.counts[0]
    assert sorted(seen) == sorted(whole.tokens.tolist())


def test_a_worker_ends_with_a_killed_trainer():
    """Its parent is the fork server, which would keep it (and its memory) for ever."""
    trainer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    code = f"import time; from datamodules.loader import _end_with; _end_with({trainer.pid}, 0); time.sleep(60)"
    worker = subprocess.Popen([sys.executable, "-c", code])
    try:
        trainer.kill()
        trainer.wait()
        assert worker.wait(timeout=50) == 1
    finally:
        worker.kill()
