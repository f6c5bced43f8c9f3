"""The on-disk rows: LitData's chunk format, written directly.

A row of text is the item `{"tokens": int32 [T], "lengths": int32 [n], "checksum": int32 [1]}`: `lengths` are the tokens
of each document piece in order, and what their sum leaves of T is padding; the checksum is the CRC-32 of all arrays
before it (1 microsecond a row), because a flipped bit would otherwise be trained on silently. A row of conversations
has two more arrays before the checksum, `"mask": uint8 [T]` (with zeros up to a multiple of 4), whether each token is
learnt as a target, and `"weights": float32 [n]`, the weight of each conversation.

LitData's own writer needs torch in every worker process (2 s each), stamps the time into its index and names chunks by
worker; a chunk is only a header with offsets and the raw arrays, so it is written here with numpy: fast, and the same
bytes for the same rows. A test reads it with LitData and compares it with LitData's own.

Chunk: uint32 number of items N; uint32 [N + 1] offsets from the start of the file; then the items. Item: uint32 bytes
of each array; the arrays. All little-endian.
"""

import json
import zlib
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from datamodules.text.packing import Piece

INDEX_NAME = "index.json"
MAX_CHUNK_BYTES = 64 << 20
"""Chunks of this size keep object stores busy; an index entry costs some 90 bytes."""

Kind = Literal["text", "conversations"]
"""What the rows of a corpus hold."""

_ARRAYS: dict[Kind, dict[str, str]] = {
    "text": {"tokens": "int32", "lengths": "int32", "checksum": "int32"},
    "conversations": {
        "tokens": "int32",
        "lengths": "int32",
        "mask": "uint8",
        "weights": "float32",
        "checksum": "int32",
    },
}
_RAW = {"int32": "no_header_numpy:2", "uint8": "no_header_numpy:4", "float32": "no_header_numpy:9"}
"""LitData's names of raw arrays."""
_LEAF = {"type": None, "context": None, "children_spec": []}


class Row(NamedTuple):
    """A row of text."""

    tokens: np.ndarray
    """int32 [T]: token ids."""
    lengths: np.ndarray
    """int32 [n]: tokens of each document piece; what is left of T is padding."""


class ConversationRow(NamedTuple):
    """A row of whole conversations."""

    tokens: np.ndarray
    """int32 [T]: token ids."""
    lengths: np.ndarray
    """int32 [n]: tokens of each conversation; what is left of T is padding."""
    mask: np.ndarray
    """uint8 [T]: 1 where the token is learnt as a target, else 0."""
    weights: np.ndarray
    """float32 [n]: weight of each conversation."""


@dataclass(frozen=True, kw_only=True)
class Tokenized:
    """A document as token ids."""

    tokens: np.ndarray
    """int32 [n]."""
    mask: np.ndarray | None = None
    """bool [n]: whether each token is learnt as a target; None in text, of which all are."""
    weight: float = 1.0
    """Of a conversation in the loss."""


def build_row(pieces: list[Piece], documents: list[Tokenized], capacity: int, pad_id: int) -> bytes:
    """Return one row as a LitData item: of conversations where the documents have masks.

    Args:
        pieces: what the row holds, in order.
        documents: all that the pieces are of.
        capacity: T, the tokens of a row.
        pad_id: token id that fills the rest.
    """
    tokens = np.full(capacity, pad_id, dtype="<i4")
    mask = np.zeros(-(-capacity // 4) * 4, dtype=np.uint8)
    position = 0
    for piece in pieces:
        document, place = documents[piece.document], slice(position, position + piece.length)
        tokens[place] = document.tokens[piece.start : piece.start + piece.length]
        if document.mask is not None:
            mask[place] = document.mask[piece.start : piece.start + piece.length]
        position += piece.length
    arrays = [tokens, np.array([piece.length for piece in pieces], dtype="<i4")]
    if any(documents[piece.document].mask is not None for piece in pieces):
        arrays += [mask, np.array([documents[piece.document].weight for piece in pieces], dtype="<f4")]
    arrays.append(np.array([_checksum(arrays)], dtype="<u4"))
    sizes = np.array([array.nbytes for array in arrays], dtype="<u4")
    return b"".join(array.tobytes() for array in (sizes, *arrays))


def _checksum(arrays: list[np.ndarray]) -> int:
    """Return the CRC-32 of (contiguous) arrays one after the other."""
    value = 0
    for array in arrays:
        value = zlib.crc32(array.data, value)
    return value


class CorruptRowError(Exception):
    """A place in a chunk that holds no row."""


def read_row(chunk: np.ndarray, number: int, capacity: int, kind: Kind) -> Row | ConversationRow:
    """Return a row of a chunk.

    Args:
        chunk: int32 [words], the content of the file.
        number: which of its rows.
        capacity: T, the tokens of a row.
        kind: what its rows hold.

    Returns:
        Arrays that are views of the chunk.

    Raises:
        CorruptRowError: if there is no such row, or its checksum is wrong.
    """
    if not 0 <= number < chunk[0]:
        raise CorruptRowError("the chunk has fewer rows")
    start, end = int(chunk[1 + number]) // 4, int(chunk[2 + number]) // 4
    first = start + len(_ARRAYS[kind])  # of the tokens, after the sizes
    if not 0 < start < end - (first - start) - capacity <= len(chunk) or end > len(chunk):
        raise CorruptRowError("its place in the chunk is wrong")
    sizes = chunk[start:first]
    documents = int(sizes[1]) // 4
    masked = -(-capacity // 4)
    words = [capacity, documents, *([masked, documents] if kind == "conversations" else []), 1]
    if sizes.tolist() != [4 * count for count in words] or first + sum(words) != end:
        raise CorruptRowError("the sizes of its parts are wrong")
    if zlib.crc32(chunk[first : end - 1].data) != int(chunk[end - 1]) & 0xFFFFFFFF:
        raise CorruptRowError("its checksum is wrong")
    tokens, lengths = chunk[first : first + capacity], chunk[first + capacity : first + capacity + documents]
    if kind == "text":
        return Row(tokens, lengths)
    rest = chunk[first + capacity + documents : end - 1]
    return ConversationRow(tokens, lengths, rest[:masked].view(np.uint8)[:capacity], rest[masked:].view(np.float32))


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


def build_index(chunks: list[dict[str, Any]], stamp: str, kind: Kind) -> str:
    """Return the content of LitData's `index.json`.

    Args:
        chunks: for each chunk its `filename`, `chunk_bytes` and `chunk_size` (rows).
        stamp: takes the place of LitData's time stamp (caches of remote folders are renewed when it changes); derived
            from the content, so that the same corpus has the same bytes.
        kind: what their rows hold.
    """
    arrays = _ARRAYS[kind]
    leaves = [_LEAF] * len(arrays)
    tree = [1, {"type": "builtins.dict", "context": json.dumps(list(arrays)), "children_spec": leaves}]
    config = {
        "chunk_bytes": MAX_CHUNK_BYTES,
        "chunk_size": None,
        "compression": None,
        "compression_batch_size": None,
        "compression_level": None,
        "data_format": [_RAW[dtype] for dtype in arrays.values()],
        "data_spec": json.dumps(tree),
        "encryption": None,
        "ipc_compression": None,
        "item_loader": "PyTreeLoader",
        "types": dict.fromkeys(arrays, "json"),
    }
    entries = [{**chunk, "dim": None} for chunk in chunks]
    return json.dumps({"chunks": entries, "config": config, "updated_at": stamp}, sort_keys=True)
