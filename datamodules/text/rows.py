"""The on-disk rows: LitData's chunk format, written directly.

A row is the item `{"tokens": int32 [T], "lengths": int32 [n], "checksum": int32 [1]}`: `lengths` are the tokens of each
document piece in order, and what their sum leaves of T is padding; the checksum is the CRC-32 of both arrays (1
microsecond a row), because a flipped bit would otherwise be trained on silently.

LitData's own writer needs torch in every worker process (2 s each), stamps the time into its index and names chunks by
worker; a chunk is only a header with offsets and the raw arrays, so it is written here with numpy: fast, and the same
bytes for the same rows. A test reads it with LitData and compares it with LitData's own.

Chunk: uint32 number of items N; uint32 [N + 1] offsets from the start of the file; then the items. Item: uint32 [3]
bytes of each array; the arrays. All little-endian.
"""

import json
import zlib
from typing import Any

import numpy as np

from datamodules.text.packing import Piece

INDEX_NAME = "index.json"
MAX_CHUNK_BYTES = 64 << 20
"""Chunks of this size keep object stores busy; an index entry costs some 90 bytes."""

_INT32 = "no_header_numpy:2"  # LitData's name of "raw int32 array"
_LEAF = {"type": None, "context": None, "children_spec": []}
_KEYS = ("tokens", "lengths", "checksum")
_TREE = [1, {"type": "builtins.dict", "context": json.dumps(_KEYS), "children_spec": [_LEAF] * len(_KEYS)}]


def build_row(pieces: list[Piece], documents: list[np.ndarray], capacity: int, pad_id: int) -> bytes:
    """Return one row as a LitData item.

    Args:
        pieces: what the row holds, in order.
        documents: int32 token ids of each document.
        capacity: T, the tokens of a row.
        pad_id: token id that fills the rest.
    """
    tokens = np.full(capacity, pad_id, dtype="<i4")
    lengths = np.array([piece.length for piece in pieces], dtype="<i4")
    position = 0
    for piece in pieces:
        tokens[position : position + piece.length] = documents[piece.document][piece.start : piece.start + piece.length]
        position += piece.length
    arrays = tokens, lengths, np.array([checksum(tokens, lengths)], dtype="<u4")
    sizes = np.array([array.nbytes for array in arrays], dtype="<u4")
    return b"".join(array.tobytes() for array in (sizes, *arrays))


def checksum(tokens: np.ndarray, lengths: np.ndarray) -> int:
    """Return the CRC-32 of a row's two (contiguous) arrays."""
    return zlib.crc32(lengths.data, zlib.crc32(tokens.data))


class CorruptRowError(Exception):
    """A place in a chunk that holds no row."""


def read_row(chunk: np.ndarray, number: int, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a row of a chunk.

    Args:
        chunk: int32 [words], the content of the file.
        number: which of its rows.
        capacity: T, the tokens of a row.

    Returns:
        int32 [T] token ids and int32 [n] tokens of each document piece, views of the chunk.

    Raises:
        CorruptRowError: if there is no such row, or its checksum is wrong.
    """
    if not 0 <= number < chunk[0]:
        raise CorruptRowError("the chunk has fewer rows")
    start, end = int(chunk[1 + number]) // 4, int(chunk[2 + number]) // 4
    tokens, lengths = chunk[start + 3 : start + 3 + capacity], chunk[start + 3 + capacity : end - 1]
    if not 0 < start < end - 3 - capacity < len(chunk) or end > len(chunk):
        raise CorruptRowError("its place in the chunk is wrong")
    sizes = chunk[start : start + 3]
    if sizes[0] != tokens.nbytes or sizes[1] != lengths.nbytes or sizes[2] != 4:
        raise CorruptRowError("the sizes of its parts are wrong")
    if checksum(tokens, lengths) != int(chunk[end - 1]) & 0xFFFFFFFF:
        raise CorruptRowError("its checksum is wrong")
    return tokens, lengths


def build_chunks(rows: list[bytes], max_bytes: int = MAX_CHUNK_BYTES) -> list[tuple[int, bytes]]:
    """Return (number of rows, file content) of the chunks that hold the rows in order."""
    chunks: list[tuple[int, bytes]] = []
    first = size = 0
    for index, row in enumerate(rows):
        if size + len(row) > max_bytes and index > first:
            chunks.append(_chunk(rows[first:index]))
            first, size = index, 0
        size += len(row)
    if first < len(rows):
        chunks.append(_chunk(rows[first:]))
    return chunks


def _chunk(rows: list[bytes]) -> tuple[int, bytes]:
    offsets = np.cumsum([4 * (len(rows) + 2), *map(len, rows)], dtype=np.int64).astype("<u4")
    return len(rows), np.array([len(rows)], dtype="<u4").tobytes() + offsets.tobytes() + b"".join(rows)


def build_index(chunks: list[dict[str, Any]], stamp: str) -> str:
    """Return the content of LitData's `index.json`.

    Args:
        chunks: for each chunk its `filename`, `chunk_bytes` and `chunk_size` (rows).
        stamp: takes the place of LitData's time stamp (caches of remote folders are renewed when it changes); derived
            from the content, so that the same corpus has the same bytes.
    """
    config = {
        "chunk_bytes": MAX_CHUNK_BYTES,
        "chunk_size": None,
        "compression": None,
        "compression_batch_size": None,
        "compression_level": None,
        "data_format": [_INT32] * len(_KEYS),
        "data_spec": json.dumps(_TREE),
        "encryption": None,
        "ipc_compression": None,
        "item_loader": "PyTreeLoader",
        "types": dict.fromkeys(_KEYS, "json"),
    }
    entries = [{**chunk, "dim": None} for chunk in chunks]
    return json.dumps({"chunks": entries, "config": config, "updated_at": stamp}, sort_keys=True)
