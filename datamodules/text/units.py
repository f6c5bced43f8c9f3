"""The unit of work of preparation, a stretch of one file of some megabytes, and where files may be cut into such."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

ROW_UNIT_BYTES = 4 << 20
"""Groups of rows (of a table on disk) are joined up to this size..."""
LARGEST_GROUP_BYTES = 8 << 20
"""...and cut above this one; not much finer, because a cut group is decoded from its start for each of its parts."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A stretch of one file that is read at once."""

    path: str
    name: str
    """How messages call it."""
    kind: Literal["text", "notebook", "jsonl", "parquet", "arrow"]
    """Text (the stretch is one document), a Jupyter notebook, a JSON object a line, or rows of a table."""
    start: int
    """First byte, or first row of a table. A JSONL unit owns the lines that start in [start, end)."""
    end: int
    """End in bytes or rows, exclusive."""
    size: int
    """Bytes, of a table about: decides which units are processed together."""
    last: bool = True
    """Whether the document ends at `end` (false inside a split text file)."""
    line: int = 1
    """Of JSONL: number of the line that `start` lies in."""


def cut_rows(groups: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Yield (first row, end, bytes) of units: small groups of rows joined, big ones cut evenly.

    Args:
        groups: (rows, bytes) of the groups in which a file stores its rows, in order.
    """
    start = end = size = 0
    for rows, amount in groups:
        parts = min(max(math.ceil(amount / LARGEST_GROUP_BYTES), 1), max(rows, 1))
        if end > start and (parts > 1 or size + amount > ROW_UNIT_BYTES):
            yield start, end, size
            start, size = end, 0
        if parts == 1:
            end, size = end + rows, size + amount
            continue
        for part in range(parts):
            start, end = end, end + (part + 1) * rows // parts - part * rows // parts
            yield start, end, amount // parts
        start = end
    if end > start:
        yield start, end, size


def tail_size(limit: int) -> int:
    """Return how many of the last of `limit` bytes a cut is looked for in."""
    return max(4, limit // 5)


def cut_tail(tail: bytes) -> int:
    """Return where to cut: after the last line end, else before a character (of mostly UTF-8).

    Args:
        tail: the bytes in which to cut and one more.
    """
    line = tail.rfind(b"\n", 0, len(tail) - 1)
    if line >= 0:
        return line + 1
    last = len(tail) - 1
    starts = [end for end in range(last, last - 4, -1) if tail[end] & 0xC0 != 0x80]  # not a continuation byte
    return starts[0] if starts else last
