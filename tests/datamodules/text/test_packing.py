import time

import numpy as np
import pytest

from datamodules.text.packing import pack


def naive_fills(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit-decreasing by looking at every row for every piece."""
    pieces = []
    for length in lengths:
        while length > capacity:
            pieces.append(capacity)
            length -= capacity
        pieces.append(length)
    free: list[int] = []
    for piece in sorted(filter(None, pieces), reverse=True):
        fitting = [n for n in range(len(free)) if free[n] >= piece]
        if fitting:
            free[min(fitting, key=lambda n: free[n])] -= piece
        else:
            free.append(capacity - piece)
    return sorted(capacity - rest for rest in free)


@pytest.mark.parametrize("seed", range(8))
def test_fills_equal_the_naive_packing_and_nothing_is_lost(seed: int):
    generator = np.random.default_rng(seed)
    capacity = int(generator.integers(1, 60))
    lengths = generator.integers(0, 3 * capacity + 2, size=200)
    rows = pack(lengths, capacity)
    assert sorted(sum(piece.length for piece in row) for row in rows) == naive_fills(lengths.tolist(), capacity)
    covered = [np.zeros(length, dtype=int) for length in lengths]
    for row in rows:
        for piece in row:
            covered[piece.document][piece.start : piece.start + piece.length] += 1
    assert all((count == 1).all() for count in covered)


def test_only_documents_longer_than_a_row_are_cut():
    lengths = np.array([5, 10, 11, 25, 1])
    pieces = [piece for row in pack(lengths, 10) for piece in row]
    counts = [sum(piece.document == document for piece in pieces) for document in range(5)]
    assert counts == [1, 1, 2, 3, 1]


def test_no_document_gives_no_row():
    assert pack(np.zeros(0, dtype=np.int64), 8) == []


def test_many_documents_pack_densely_and_fast():
    lengths = np.maximum(8, np.random.default_rng(0).lognormal(6.3, 1.2, 50_000).astype(np.int64))
    start = time.perf_counter()
    rows = pack(lengths, 8192)
    assert time.perf_counter() - start < 5  # about 0.3 s; a quadratic packing takes minutes
    assert lengths.sum() / (len(rows) * 8192) > 0.999
