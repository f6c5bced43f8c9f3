"""Parquet and Arrow files against the lists they were written from."""

import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.text import tables, units
from datamodules.text.policies import Policies, Tally
from datamodules.text.preparation import Preparation, prepare_corpus
from datamodules.text.units import cut_rows
from modules.errors import UserError
from tests.datamodules.conftest import small
from tests.datamodules.text.test_preparation import tree
from tests.datamodules.text.test_sources import counts, read

TYPES = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "binary": pa.binary(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "large dictionary": pa.dictionary(pa.int16(), pa.large_string()),
}


def make_texts(count: int) -> list[str | None]:
    generator = random.Random(3)
    texts: list[str | None] = [
        f"{n} " + "".join(generator.choices("abc é😀\n", k=generator.randint(1, 60))) for n in range(count)
    ]
    texts[2] = texts[count // 2] = None
    return texts


def write_arrow(table: pa.Table, file: Path, rows: int) -> None:
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("codec", ["none", "snappy", "zstd", "gzip"])
def test_text_columns_of_every_type_are_read(name: str, codec: str, tmp_path):
    texts = make_texts(50)
    values = [None if text is None else text.encode() for text in texts] if name == "binary" else texts
    column = pa.array(values, pa.string()).cast(TYPES[name]) if "dict" not in name else pa.array(values, TYPES[name])
    table = pa.table({"id": range(50), "text": column, "list": [[n] for n in range(50)]})
    pq.write_table(table, tmp_path / "a.parquet", compression=codec, row_group_size=7)
    found, tally = read([tmp_path])
    assert found == [text for text in texts if text is not None]
    assert counts(tally.skipped) == {"null in the column 'text'": 2}
    assert tally.skipped["null in the column 'text'"]["examples"] == [
        f"{tmp_path / 'a.parquet'} row 2", f"{tmp_path / 'a.parquet'} row 25",
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", [".parquet", ".pq", ".arrow"])
@pytest.mark.parametrize("largest", [40, 400, 10**9])
@pytest.mark.parametrize("wanted", [1, 300, 10**9])
def test_any_cut_gives_the_same_rows(suffix: str, largest: int, wanted: int, tmp_path, monkeypatch):
    monkeypatch.setattr(units, "LARGEST_GROUP_BYTES", largest)
    monkeypatch.setattr(units, "ROW_UNIT_BYTES", wanted)
    monkeypatch.setattr(tables, "_BATCH_BYTES", 50)
    texts = make_texts(300)
    table, file = pa.table({"text": texts}), tmp_path / f"a{suffix}"
    if suffix == ".arrow":
        write_arrow(table, file, 64)
    else:
        pq.write_table(table, file, row_group_size=64)
    policies, tally = Policies(), Tally()
    kind = "arrow" if suffix == ".arrow" else "parquet"
    found = list(tables.table_units(str(file), "a", kind, policies, tally))
    assert [unit.start for unit in found] == [0, *(unit.end for unit in found)][:-1]
    assert found[-1].end == 300
    assert (len(found) > 20) == (largest < 10**9)
    rows = [row for unit in found for row in tables.read_rows(unit, "text")]
    assert rows == [None if text is None else text.encode() for text in texts]


def test_groups_are_joined_and_cut_by_size(monkeypatch):
    monkeypatch.setattr(units, "ROW_UNIT_BYTES", 10)
    monkeypatch.setattr(units, "LARGEST_GROUP_BYTES", 30)
    groups = [(2, 4), (3, 6), (1, 1), (5, 70), (0, 0), (4, 20), (1, 900)]
    assert list(cut_rows(groups)) == [
        (0, 5, 10), (5, 6, 1), (6, 7, 23), (7, 9, 23), (9, 11, 23), (11, 15, 20), (15, 16, 900),
    ]  # fmt: skip
    assert list(cut_rows([])) == []


def test_a_column_that_is_missing_or_no_text_is_one_line_with_the_text_columns_there(tmp_path):
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    columns = "give one that holds text: body$"
    with pytest.raises(UserError, match=rf"^text_key: .*a\.parquet has no column 'text'; {columns}"):
        read([tmp_path])
    with pytest.raises(UserError, match=rf"^text_key: .*has a column 'id' of int64, not of text; {columns}"):
        read([tmp_path], text_key="id")
    assert read([tmp_path], text_key="body")[0] == ["x"]


def test_a_table_without_text_is_told_so_and_no_column_is_advised(tmp_path):
    pq.write_table(pa.table({"text": [1], "size": [2.0]}), tmp_path / "a.parquet")
    message = r"^text_key: .*a\.parquet has a column 'text' of int64, not of text; none of its columns holds text$"
    with pytest.raises(UserError, match=message):
        read([tmp_path])


def test_bad_encodings_empty_and_oversized_texts_follow_the_policies(tmp_path):
    raw = pa.array([b"ok", b"\xff!", b"", b" \n", b"line\n" * 10]).cast(pa.large_binary())
    texts = pa.LargeStringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    found, tally = read([tmp_path], max_document_bytes=20)
    assert found[:2] == ["ok", "\ufffd!"]
    assert "".join(found[2:]) == "line\n" * 10
    assert counts(tally.skipped) == {"empty": 2}
    assert counts(tally.changed) == {"bad bytes replaced by U+FFFD": 1, "over max_document_bytes, split": 1}
    assert read([tmp_path], encoding="skip", oversized="skip", max_document_bytes=20)[0] == ["ok"]
    with pytest.raises(UserError, match=r"a\.parquet row 1: byte 0 is not UTF-8"):
        read([tmp_path], encoding="strict")


def test_a_null_stops_a_strict_preparation(tmp_path):
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet row 1: null in the column 'text'; mend it"):
        read([tmp_path], malformed="strict")


def test_corrupt_tables_are_counted_or_stop(tmp_path):
    pq.write_table(pa.table({"text": ["a" * 90] * 40}), tmp_path / "good.parquet")
    whole = (tmp_path / "good.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-20])
    (tmp_path / "lie.pq").write_bytes(b"not a table")
    (tmp_path / "empty.parquet").write_bytes(b"")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "no_rows.parquet")
    found, tally = read([tmp_path])
    assert found == ["a" * 90] * 40
    assert counts(tally.skipped) == {"cannot be decoded": 2, "empty": 2}
    with pytest.raises(UserError, match=r"cut\.parquet: cannot be decoded \(.*\); mend it"):
        read([tmp_path], malformed="strict")


def test_rows_behind_a_damaged_page_are_counted(tmp_path):
    texts = [f"{n:03d} " + "x" * 60 for n in range(1000)]
    options = {"row_group_size": 250, "compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", **options)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[content.index(b"300 xxx")] ^= 1
    (tmp_path / "a.parquet").write_bytes(bytes(content))
    found, tally = read([tmp_path])
    kept = texts[: len(found)]
    assert found == kept
    assert len(found) >= 250
    lost = tally.skipped["cannot be decoded"]
    assert lost["count"] == 1000 - len(found)
    assert lost["examples"] == [f"{tmp_path / 'a.parquet'} rows {len(found)} to 999"]
    with pytest.raises(UserError, match=r"a\.parquet rows \d+ to 999: cannot be decoded"):
        read([tmp_path], malformed="strict")


def test_a_file_that_changes_in_the_same_process_is_read_anew(tmp_path):
    for text in ("first", "other"):
        pq.write_table(pa.table({"text": [text]}), tmp_path / "a.parquet")
        assert read([tmp_path])[0] == [text]


def test_a_corpus_from_parquet_has_the_rows_of_one_from_files(documents: list[str], tmp_path):
    (tmp_path / "in").mkdir()
    for part in range(3):
        table = pa.table({"n": range(100), "text": documents[100 * part : 100 * part + 100]})
        pq.write_table(table, tmp_path / "in" / f"{part}.parquet", row_group_size=30)
    corpus, _ = prepare_corpus(small(tmp_path / "in", tmp_path / "out"))
    kept = {text for text in documents if text.strip()}
    assert corpus["documents"] == len(kept)
    assert corpus["bytes"] == sum(len(text.encode()) for text in kept)
    prepare_corpus(small(tmp_path / "in", tmp_path / "parallel", workers=2))
    assert tree(tmp_path / "parallel") == tree(tmp_path / "out")


def test_duplicates_across_formats_are_found(tmp_path):
    pq.write_table(pa.table({"text": ["same", "one"]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": "same"}\n{"text": "two"}\n')
    options = {"validation_fraction": 0.0, "workers": 1, "sequence_length": 8}
    corpus, _ = prepare_corpus(Preparation(paths=[str(tmp_path)], output=tmp_path / "out", **options))
    assert corpus["documents"] == 3
    assert Counter(counts(corpus["skipped"])) == {"duplicate": 1}
