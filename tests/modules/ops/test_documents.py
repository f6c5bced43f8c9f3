"""Document borders against a plain loop."""

import pytest
import torch

from modules.ops.documents import DocumentLayout
from tests.modules.helpers import document_ids, spans


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
    assert torch.equal(layout.boundaries, known)
    assert list(layout.spans) == [(0, 3), (3, 14)]


def test_ids_may_jump_and_repeat_between_rows() -> None:
    """Rows cut from a corpus keep its document numbers: the last of one row may be the first of the next."""
    layout = DocumentLayout(torch.tensor([[5, 5, 9], [9, 9, 12]], dtype=torch.int32))
    assert list(layout.spans) == [(0, 2), (2, 3), (3, 5), (5, 6)]


def test_borders_stay_on_the_host_and_are_not_asked_of_a_device() -> None:
    """A tensor on the meta device has no values: whoever asked it would fail."""
    known = torch.tensor([0, 3, 14], dtype=torch.int32)
    layout = DocumentLayout(torch.zeros(2, 7, dtype=torch.int32, device="meta"), known)
    assert list(layout.spans) == [(0, 3), (3, 14)]
    assert (layout.boundaries.device.type, layout.boundaries.shape) == ("meta", (3,))
