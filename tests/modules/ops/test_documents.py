"""Document borders against a plain loop."""

import pytest
import torch

from modules.ops.documents import DocumentLayout, bring_boundaries
from tests.modules.helpers import document_ids, packed_batch, spans


@pytest.mark.parametrize("rows", [([7],), ([1] * 7,), ([3, 4], [7]), ([7], [7]), ([2, 5], [1, 1, 5], [6, 1])])
def test_borders_equal_a_loop(rows: tuple[list[int], ...]) -> None:
    ids = document_ids(*rows)
    expected = [(row * 7 + part.start, row * 7 + part.stop) for row, part in spans(ids)]
    layout = DocumentLayout(ids)
    assert list(layout.spans) == expected
    assert layout.boundaries.dtype == torch.int32
    assert layout.boundaries.tolist() == [start for start, _ in expected] + [ids.numel()]
    allowed = torch.zeros(len(rows), 1, 7, 7, dtype=torch.bool)
    for row, part in spans(ids):
        for position in range(part.start, part.stop):
            allowed[row, 0, position, part.start : position + 1] = True
    assert torch.equal(layout.mask, allowed)


def test_known_boundaries_are_taken() -> None:
    known = torch.tensor([0, 3, 14], dtype=torch.int32)
    layout = DocumentLayout(torch.zeros(2, 7, dtype=torch.int32), known)
    assert layout.boundaries is known
    assert list(layout.spans) == [(0, 3), (3, 14)]


def test_ids_may_jump_and_repeat_between_rows() -> None:
    """Rows cut from a corpus keep its document numbers: the last of one row may be the first of the next."""
    layout = DocumentLayout(torch.tensor([[5, 5, 9], [9, 9, 12]], dtype=torch.int32))
    assert list(layout.spans) == [(0, 2), (2, 3), (3, 5), (5, 6)]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_batch_on_its_way_to_a_device_gets_its_boundaries(device: str) -> None:
    batch = packed_batch(document_ids([5, 11], [16]), 64, 2)
    on_device = batch.map(lambda tensor: tensor.to(device))
    moved = bring_boundaries(batch, on_device)
    assert batch.boundaries is None
    if device == "cpu":
        assert moved.boundaries is None, "free to work out there"
    else:
        assert (moved.boundaries.device.type, moved.boundaries.shape) == (device, (4,))
