import json
import zlib

import numpy as np
from litdata import StreamingDataset
from litdata.streaming import Cache

from datamodules.text.packing import Piece
from datamodules.text.rows import Tokenized, build_chunks, build_index, build_row


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
