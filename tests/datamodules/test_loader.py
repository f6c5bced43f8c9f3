import subprocess
import sys
from pathlib import Path

import pytest
import torch

from datamodules.loader import RankShare, ValidationLoader, Windows, build_batch
from datamodules.text.corpus import Corpus, RowReader
from datamodules.text.mixture import Mixture, MixturePhase
from datamodules.text.rows import ConversationRow
from modules.batch import IGNORED_LABEL, ConversationBatch, Window, shifted_labels, target_positions
from modules.ops.documents import document_boundaries

STEPS = 12


@pytest.fixture(scope="module")
def reader(corpus_folder: Path) -> RowReader:
    return Corpus(str(corpus_folder)).rows("train")


def load(reader: RowReader, ranks: int = 1, rank: int = 0, micro: int = 2, workers: int = 0, first: int = 0):
    phases = [MixturePhase(end_step=STEPS, weights={"a": 1.0})]
    mixture = Mixture({"a": reader.chunk_rows}, phases, rows_per_step=8, seed=5)
    windows = Windows(mixture, [reader], RankShare(rank=rank, ranks=ranks, micro_batch_size=micro))
    return windows.load(first, STEPS, workers)


def same(a: Window, b: Window) -> bool:
    pairs = zip(a.micro_batches, b.micro_batches, strict=True)
    return a.step == b.step and all(
        torch.equal(x.boundaries, y.boundaries)
        and all(torch.equal(v, getattr(y, name)) for name, v in x.tensors().items())
        for x, y in pairs
    )


def rows_of(window: Window) -> torch.Tensor:
    return torch.cat([batch.tokens for batch in window.micro_batches])


def naive_labels(tokens: list[int], lengths: list[int]) -> list[int]:
    labels = []
    position = 0
    for length in lengths:
        labels += [*tokens[position + 1 : position + length], IGNORED_LABEL]
        position += length
    return labels + [IGNORED_LABEL] * (len(tokens) - position)


def test_a_batch_has_the_labels_and_documents_of_its_rows(reader: RowReader):
    rows = [reader.read(n) for n in range(len(reader))]
    used = [int(lengths.sum()) for _, lengths in rows]
    assert min(used) < 64 == max(used)
    batch = build_batch(rows, missing=2)
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.document_ids.dtype == torch.int32
    assert batch.tokens.shape == batch.labels.shape == batch.document_ids.shape == (len(rows) + 2, 64)
    for number, (tokens, lengths) in enumerate(rows):
        sizes = lengths.tolist()
        assert batch.tokens[number].tolist() == tokens.tolist()
        assert batch.labels[number].tolist() == naive_labels(tokens.tolist(), sizes)
        documents = [document for document, size in enumerate(sizes) for _ in range(size)]
        padding = [64] * (64 - sum(sizes))
        assert batch.document_ids[number].tolist() == documents + padding
    assert torch.equal(batch.boundaries, document_boundaries(batch.document_ids))
    assert batch.boundaries.dtype == torch.int32
    assert batch.text_positions.item() == sum(used)
    assert (batch.labels[-2:] == IGNORED_LABEL).all()


@pytest.mark.parametrize(("ranks", "micro"), [(1, 8), (1, 1), (2, 2), (4, 1), (8, 1)])
def test_a_step_has_the_same_rows_for_any_ranks_and_micro_batches(reader: RowReader, ranks: int, micro: int):
    expected = [rows_of(window) for window in load(reader, micro=8)]
    of_ranks = [list(load(reader, ranks, rank, micro)) for rank in range(ranks)]
    for step in range(STEPS):
        windows = [windows[step] for windows in of_ranks]
        assert {(window.step, window.tokens, window.samples) for window in windows} == {(step + 1, 8 * 64, 8)}
        assert {len(window.micro_batches) for window in windows} == {8 // (ranks * micro)}
        joined = torch.stack([rows_of(window) for window in windows], dim=1).flatten(0, 1)  # rank r: rows r, r + R, ...
        assert torch.equal(joined, expected[step])


def test_two_workers_give_the_windows_of_none(reader: RowReader):
    plain = list(load(reader))
    assert [window.step for window in plain] == list(range(1, STEPS + 1))
    assert all(same(a, b) for a, b in zip(plain, load(reader, workers=2), strict=True))
    for workers in (0, 2):
        assert all(same(a, b) for a, b in zip(plain[9:], load(reader, workers=workers, first=9), strict=True))


def test_iterating_leaves_the_global_generator_alone(reader: RowReader):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    next(load(reader))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("ranks", "micro", "count"), [(1, 4, 10), (2, 4, 9), (4, 2, 9), (2, 2, 1), (3, 1, 3)])
def test_validation_has_equal_batches_everywhere_and_every_row_once(
    reader: RowReader, ranks: int, micro: int, count: int
):
    rows = [(0, n) for n in range(count)]
    loaders = [
        ValidationLoader([reader], rows, RankShare(rank=rank, ranks=ranks, micro_batch_size=micro))
        for rank in range(ranks)
    ]
    batches = [list(loader) for loader in loaders]
    assert {len(of_rank) for of_rank in batches} == {-(-count // (ranks * micro))} == {len(loaders[0])}
    seen = []
    total = 0
    for batch in (batch for of_rank in batches for batch in of_rank):
        assert batch.tokens.shape == (micro, 64)
        total += int((batch.labels != IGNORED_LABEL).sum())
        seen += [row.tolist() for row, labels in zip(batch.tokens, batch.labels, strict=True) if labels.max() >= 0]
    whole = build_batch([reader.read(n) for _, n in rows])
    assert total == (whole.labels != IGNORED_LABEL).sum()
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


def test_labels_of_conversations_are_where_the_target_is_learnt(conversations_folder: Path):
    reader = Corpus(str(conversations_folder)).rows("train")
    rows = [reader.read(n) for n in range(len(reader))]
    batch = build_batch(rows, missing=1)
    assert isinstance(batch, ConversationBatch)
    assert batch.loss_weights.dtype == torch.float32
    assert batch.boundaries.tolist() == document_boundaries(batch.document_ids).tolist()
    weights_seen = set()
    for number, row in enumerate(rows):
        assert isinstance(row, ConversationRow)
        start = 0
        for length, weight in zip(row.lengths.tolist(), row.weights.tolist(), strict=True):
            for t in range(start, start + length):
                is_learnt = t + 1 < start + length and row.mask[t + 1]
                assert batch.labels[number, t] == (row.tokens[t + 1] if is_learnt else IGNORED_LABEL)
                assert batch.loss_weights[number, t] == (weight if is_learnt else 0)
            start += length
            weights_seen.add(weight)
        assert (batch.labels[number, start:] == IGNORED_LABEL).all()
        assert (batch.loss_weights[number, start:] == 0).all()
        # what a second depth predicts is learnt too, and in the same conversation
        second = shifted_labels(batch.labels, batch.document_ids, 1)[number]
        for t in (second != IGNORED_LABEL).nonzero().flatten().tolist():
            assert row.mask[t + 2]
            assert row.tokens[t + 2] == second[t]
            assert batch.document_ids[number, t] == batch.document_ids[number, t + 2]
    assert weights_seen == {0.5, 1.0}
    assert (batch.labels[-1] == IGNORED_LABEL).all()
    assert (batch.loss_weights[-1] == 0).all()
    positions = target_positions(batch.labels, batch.document_ids, 0)
    assert positions is not None
    assert positions.tolist() == (batch.labels.flatten() != IGNORED_LABEL).nonzero().flatten().tolist()
