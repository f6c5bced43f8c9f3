"""The label helpers against loops over positions."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from modules.batch import (
    IGNORED_LABEL,
    PackedBatch,
    Progress,
    Window,
    count_targets,
    next_token_labels,
    shifted_labels,
    target_positions,
)
from tests.modules.helpers import document_ids, packed_batch

ROWS = {
    "one document": ([11], [11]),
    "several": ([4, 4, 3], [10, 1]),
    "single tokens": ([1] * 11, [1, 10]),
}


def shift_by_loop(labels: Tensor, ids: Tensor, shift: int) -> list[list[int]]:
    length = labels.shape[1]
    return [
        [
            labels[row, t + shift].item() if t + shift < length and ids[row, t] == ids[row, t + shift] else -100
            for t in range(length)
        ]
        for row in range(len(labels))
    ]


def make_inputs(rows: tuple[list[int], list[int]]) -> tuple[Tensor, Tensor]:
    ids = document_ids(*rows)
    return torch.randint(0, 50, ids.shape, generator=torch.Generator().manual_seed(0)), ids


def test_text_is_what_is_not_padding() -> None:
    batch = packed_batch(document_ids([4, 4, 2], [9, 1], [10]), 50)
    assert batch.text_positions.item() == 30
    batch.document_ids[0, 8:] = 10
    batch.document_ids[1, 9:] = 10
    assert batch.text_positions.item() == 27


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("shift", [0, 1, 2, 5, 10, 11, 12, 30])
def test_shifted_labels(rows: tuple[list[int], list[int]], shift: int) -> None:
    labels, ids = make_inputs(rows)
    before = labels.clone()
    shifted = shifted_labels(labels, ids, shift)
    assert shifted.tolist() == shift_by_loop(labels, ids, shift)
    assert shifted.dtype == torch.int64
    assert torch.equal(labels, before)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_next_token_labels(rows: tuple[list[int], list[int]]) -> None:
    tokens, ids = make_inputs(rows)
    assert next_token_labels(tokens, ids).tolist() == shift_by_loop(tokens, ids, 1)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("depths", [0, 1, 3])
def test_count_targets(rows: tuple[list[int], list[int]], depths: int) -> None:
    tokens, ids = make_inputs(rows)
    labels = next_token_labels(tokens, ids)
    labels[0, 2:4] = IGNORED_LABEL
    expected = [
        sum(label != -100 for row in shift_by_loop(labels, ids, depth) for label in row) for depth in range(depths + 1)
    ]
    counts = count_targets(labels, ids, depths)
    assert counts.tolist() == expected
    assert counts.dtype == torch.int64


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("depths", [0, 1, 3])
def test_target_positions(rows: tuple[list[int], list[int]], depths: int) -> None:
    tokens, ids = make_inputs(rows)
    labels = next_token_labels(tokens, ids)
    labels[0, 2:4] = IGNORED_LABEL
    flat = [label for depth in range(depths + 1) for row in shift_by_loop(labels, ids, depth) for label in row]
    assert target_positions(labels, ids, depths).tolist() == [
        place for place, label in enumerate(flat) if label != -100
    ]


def test_where_nearly_all_are_targets_none_is_picked() -> None:
    tokens, ids = torch.arange(40).view(2, 20), torch.zeros(2, 20, dtype=torch.int32)
    labels = next_token_labels(tokens, ids)
    assert target_positions(labels, ids, 0) is None
    labels[0, :3] = IGNORED_LABEL
    assert len(target_positions(labels, ids, 0)) == 35


def test_depth_targets_are_further_tokens_of_the_same_document() -> None:
    """Depth k of position t is the token k + 1 ahead of it, in words a person can check."""
    tokens = torch.tensor([[10, 11, 12, 13, 20, 21]])
    ids = document_ids([4, 2])
    labels = next_token_labels(tokens, ids)
    assert labels.tolist() == [[11, 12, 13, -100, 21, -100]]
    assert shifted_labels(labels, ids, 1).tolist() == [[12, 13, -100, -100, -100, -100]]
    assert shifted_labels(labels, ids, 2).tolist() == [[13, -100, -100, -100, -100, -100]]


@dataclass(kw_only=True)
class Weighted(PackedBatch):
    weights: Tensor
    teacher: Tensor | None = None
    source: str = "here"


def weighted() -> Weighted:
    plain = packed_batch(document_ids([3, 5]), 50)
    return Weighted(**vars(plain), weights=torch.arange(8.0).unsqueeze(0))


def test_a_stage_extends_the_batch_with_fields_of_its_own() -> None:
    batch = weighted()
    batch.boundaries, batch.positions = torch.tensor([0, 3, 8]), torch.tensor([2])
    assert list(batch.tensors()) == ["tokens", "labels", "document_ids", "weights"]
    for moved in (batch.map(lambda tensor: tensor.to("meta")), batch.to(torch.device("meta"))):
        assert isinstance(moved, Weighted)
        assert all(tensor.is_meta for tensor in (*moved.tensors().values(), moved.positions))
        assert (moved.teacher, moved.source) == (None, "here")
        assert moved.boundaries is batch.boundaries, "borders stay on the host"
    assert not batch.tokens.is_meta


def test_a_window_moves_as_a_whole() -> None:
    window = Window(step=3, micro_batches=[weighted(), packed_batch(document_ids([8]), 50)], tokens=16, samples=2)
    moved = window.to(torch.device("meta"))
    assert (moved.step, moved.tokens, moved.samples) == (3, 16, 2)
    assert [type(batch) for batch in moved.micro_batches] == [Weighted, PackedBatch]
    assert all(tensor.is_meta for batch in moved.micro_batches for tensor in batch.tensors().values())


def test_progress_adds_up_windows_of_any_size() -> None:
    progress = Progress()
    for step, (tokens, samples) in enumerate([(16, 2), (100, 3)], start=1):
        progress = progress.after(Window(step=step, micro_batches=[], tokens=tokens, samples=samples))
    assert progress == Progress(steps=2, tokens=116, samples=5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
def test_pin_memory_pins_every_tensor() -> None:
    window = Window(step=1, micro_batches=[weighted()], tokens=8, samples=1).pin_memory()
    (batch,) = window.micro_batches
    assert isinstance(batch, Weighted)
    assert all(tensor.is_pinned() for tensor in batch.tensors().values())
