import json
import zlib

import numpy as np
import pytest
from litdata import StreamingDataset
from litdata.streaming import Cache

from datamodules.text.packing import Piece
from datamodules.text.rows import (
    ConversationRow,
    CorruptRowError,
    Tokenized,
    build_chunks,
    build_index,
    build_row,
    read_row,
)


def make_rows(count: int, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        lengths = generator.integers(1, length // 4, size=generator.integers(1, 4)).astype(np.int32)
        rows.append((generator.integers(0, 131_072, size=length).astype(np.int32), lengths))
    return rows


def as_items(rows: list[tuple[np.ndarray, np.ndarray]]) -> list[bytes]:
    """The rows as items, each built as one document of T tokens cut where the lengths say."""
    items = []
    for tokens, lengths in rows:
        starts = np.cumsum(lengths) - lengths
        pieces = [Piece(0, int(s), int(n)) for s, n in zip(starts, lengths, strict=True)]
        tokens[int(lengths.sum()) :] = 9
        items.append(build_row(pieces, [Tokenized(tokens=tokens)], len(tokens), 9))
    return items


def crc(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.array([zlib.crc32(tokens.tobytes() + lengths.tobytes())], dtype=np.uint32).view(np.int32)


def test_chunks_and_index_are_what_litdata_writes(tmp_path):
    rows = make_rows(7, 32)
    items = as_items(rows)
    cache = Cache(str(tmp_path), chunk_size=7)
    for number, (tokens, lengths) in enumerate(rows):
        cache[number] = {"tokens": tokens, "lengths": lengths, "checksum": crc(tokens, lengths)}
    cache.done()
    cache.merge()
    [(count, content)] = build_chunks(items)
    assert count == 7
    assert content == (tmp_path / "chunk-0-0.bin").read_bytes()
    theirs = json.loads((tmp_path / "index.json").read_text())
    entry = {"filename": "chunk-0-0.bin", "chunk_bytes": len(content), "chunk_size": 7}
    ours = json.loads(build_index([entry], "5", "text"))
    assert ours["chunks"] == theirs["chunks"]
    for limit in ("chunk_size", "chunk_bytes"):
        del ours["config"][limit], theirs["config"][limit]
    assert ours["config"] == theirs["config"]
    assert ours["updated_at"] == "5"


def test_litdata_reads_every_row_of_every_chunk(tmp_path):
    rows = make_rows(50, 16)
    items = as_items(rows)
    entries = []
    chunks = build_chunks(items, max_bytes=3 * len(items[0]))
    assert len(chunks) > 10
    for number, (count, content) in enumerate(chunks):
        assert len(content) < 4 * max(map(len, items)) + 100
        (tmp_path / f"c{number}.bin").write_bytes(content)
        entries.append({"filename": f"c{number}.bin", "chunk_bytes": len(content), "chunk_size": count})
    (tmp_path / "index.json").write_text(build_index(entries, "0", "text"))
    dataset = StreamingDataset(str(tmp_path), batch_decode=0)
    assert len(dataset) == 50
    for number in (49, 0, 17, 18, 3):
        assert dataset[number]["tokens"].tolist() == rows[number][0].tolist()
        assert dataset[number]["lengths"].tolist() == rows[number][1].tolist()


def test_what_the_pieces_leave_is_padding():
    documents = [Tokenized(tokens=np.arange(*ends, dtype=np.int32)) for ends in ((10, 20), (30, 33))]
    row = build_row([Piece(1, 0, 3), Piece(0, 6, 4)], documents, 9, 5)
    numbers = [30, 31, 32, 16, 17, 18, 19, 5, 5, 3, 4]
    expected = crc(np.array(numbers[:9], dtype=np.int32), np.array(numbers[9:], dtype=np.int32))
    assert np.frombuffer(row, dtype="<i4").tolist() == [36, 8, 4, *numbers, *expected.tolist()]


def make_conversations(count: int, length: int) -> list[tuple[Tokenized, Tokenized]]:
    generator = np.random.default_rng(1)
    return [
        tuple(
            Tokenized(
                tokens=generator.integers(0, 131_072, size=size).astype(np.int32),
                mask=generator.random(size) < 0.3,
                weight=float(generator.random()),
            )
            for size in generator.integers(1, length // 2, size=2)
        )
        for _ in range(count)
    ]  # type: ignore[return-value]


def test_rows_of_conversations_are_what_litdata_writes_and_reads(tmp_path):
    length = 30  # the mask is filled up to 32
    pairs = make_conversations(9, length)
    items = []
    cache = Cache(str(tmp_path), chunk_size=9)
    for number, pair in enumerate(pairs):
        pieces = [Piece(n, 0, len(part.tokens)) for n, part in enumerate(pair)]
        items.append(build_row(pieces, list(pair), length, 9))
        used = sum(len(part.tokens) for part in pair)
        arrays = {
            "tokens": np.concatenate([*(part.tokens for part in pair), np.full(length - used, 9, dtype=np.int32)]),
            "lengths": np.array([len(part.tokens) for part in pair], dtype=np.int32),
            "mask": np.concatenate([*(part.mask for part in pair), np.zeros(32 - used)]).astype(np.uint8),
            "weights": np.array([part.weight for part in pair], dtype=np.float32),
        }
        value = zlib.crc32(b"".join(array.tobytes() for array in arrays.values()))
        cache[number] = arrays | {"checksum": np.array([value], dtype=np.uint32).view(np.int32)}
    cache.done()
    cache.merge()
    [(count, content)] = build_chunks(items)
    assert count == 9
    assert content == (tmp_path / "chunk-0-0.bin").read_bytes()
    theirs = json.loads((tmp_path / "index.json").read_text())
    ours = json.loads(build_index([], "5", "conversations"))
    for key in ("data_format", "data_spec", "types"):
        assert ours["config"].get(key) == theirs["config"].get(key), key
    words = np.frombuffer(content, dtype=np.int32)
    for number, pair in enumerate(pairs):
        row = read_row(words, number, length, "conversations")
        assert isinstance(row, ConversationRow)
        used = sum(len(part.tokens) for part in pair)
        assert row.tokens[:used].tolist() == [index for part in pair for index in part.tokens.tolist()]
        assert row.mask.tolist() == [int(bit) for part in pair for bit in part.mask] + [0] * (length - used)
        assert row.weights.tolist() == np.array([part.weight for part in pair], dtype=np.float32).tolist()
        assert row.lengths.tolist() == [len(part.tokens) for part in pair]


@pytest.mark.parametrize("place", ["tokens", "mask", "weights"])
def test_a_flipped_bit_of_a_conversation_is_found(place):
    pair = make_conversations(1, 32)[0]
    row = build_row([Piece(n, 0, len(part.tokens)) for n, part in enumerate(pair)], list(pair), 32, 9)
    [(_, content)] = build_chunks([row])
    damaged = bytearray(content)
    header = len(content) - len(row) + 20
    damaged[header + {"tokens": 5, "mask": 4 * 32 + 8 + 3, "weights": 4 * 32 + 8 + 32 + 1}[place]] ^= 1
    with pytest.raises(CorruptRowError, match="its checksum is wrong"):
        read_row(np.frombuffer(damaged, dtype=np.int32), 0, 32, "conversations")
    with pytest.raises(CorruptRowError, match="sizes of its parts"):
        read_row(np.frombuffer(content, dtype=np.int32), 0, 31, "conversations")
