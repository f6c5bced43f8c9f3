import bz2
import gzip
import json
import lzma
import os
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.text import sources
from datamodules.text.documents import read_unit
from datamodules.text.policies import Policies, Tally
from datamodules.text.sources import list_units
from modules.errors import UserError


def read(paths: list[Path | str], **options: object) -> tuple[list[str], Tally]:
    """Texts of all documents, and the tally."""
    policies = Policies(**options)  # type: ignore[arg-type]
    tally = Tally()
    units = list_units([str(path) for path in paths], policies, tally, Path("unused"))
    return [document.text for unit in units for document in read_unit(unit, policies, tally)], tally


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def counts(entries: dict) -> dict[str, int]:
    return {reason: entry["count"] for reason, entry in entries.items()}


def test_folders_are_walked_in_sorted_order_and_what_is_left_out_is_counted(tmp_path):
    write(tmp_path, {"b.txt": b"2", "a/z.MD": b"0", "a/a.py": b"x = 1", "c.png": b"\x89PNG", ".hidden": b"h"})
    write(tmp_path, {".git/config.txt": b"g", "d.jsonl": b'{"text": "3"}\n'})
    os.symlink(tmp_path / "a", tmp_path / "link")
    texts, tally = read([tmp_path])
    assert texts == ["2", "3", "x = 1", "0"]
    assert counts(tally.skipped) == {
        "hidden folder": 1, "linked folder": 1, "hidden file": 1, "unsupported suffix": 1,
    }  # fmt: skip
    assert tally.skipped["unsupported suffix"]["examples"] == [str(tmp_path / "c.png")]


def test_missing_and_unknown_paths_are_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        read([tmp_path / "nowhere"])
    write(tmp_path, {"model.bin": b"\0"})
    with pytest.raises(UserError, match=r"model\.bin has the suffix '\.bin'"):
        read([tmp_path / "model.bin"])


def test_the_default_corpus_is_the_standard_library_without_tests(tmp_path, monkeypatch):
    write(tmp_path, {"abc.py": b"A", "json/__init__.py": b"B", "test/t.py": b"C", "site-packages/p.py": b"D"})
    write(tmp_path, {"tests/t.py": b"C", "idlelib/idle_test/t.py": b"C", "abc.so": b"E", "notes.txt": b"F"})
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert read(["stdlib"])[0] == ["A", "B"]
    monkeypatch.undo()
    texts, _ = read(["stdlib"])
    assert len(texts) > 300
    assert any("class JSONDecoder" in text for text in texts)


BAD = b"good \xff\xfe bad"


def test_bad_encodings(tmp_path):
    write(tmp_path, {"a.txt": BAD, "b.txt": b"\xef\xbb\xbfwith mark", "c.jsonl": b'{"text": "ok"}\n{"text": "\xff"}\n'})
    with pytest.raises(UserError, match=r"a\.txt: byte 5 is not UTF-8; .*encoding"):
        read([tmp_path], encoding="strict")
    texts, tally = read([tmp_path], encoding="skip")
    assert texts == ["with mark", "ok"]
    assert counts(tally.skipped) == {"not UTF-8": 2}
    assert tally.skipped["not UTF-8"]["bytes"] == len(BAD) + 14
    texts, tally = read([tmp_path], encoding="replace")
    assert texts == ["good \ufffd\ufffd bad", "with mark", "ok", "\ufffd"]
    assert counts(tally.changed) == {"bad bytes replaced by U+FFFD": 2}
    assert not tally.skipped


def test_half_a_surrogate_pair_is_a_bad_encoding(tmp_path):
    write(tmp_path, {"a.jsonl": rb'{"text": "x\ud83d"}' + b"\n" + rb'{"text": "\ud83d\ude00"}'})
    assert read([tmp_path], encoding="skip")[0] == ["😀"]
    texts, tally = read([tmp_path], encoding="replace")
    assert texts == ["x\ufffd\ufffd\ufffd", "😀"]
    assert tally.changed


def test_empty_documents(tmp_path):
    write(tmp_path, {"a.txt": b"", "b.txt": b" \n", "c.txt": b"c", "d.jsonl": b'{"text": ""}\n\n', "e.jsonl": b""})
    texts, tally = read([tmp_path])
    assert texts == ["c"]
    assert counts(tally.skipped) == {"empty": 4}
    with pytest.raises(UserError, match=r"a\.txt: the document is empty"):
        read([tmp_path], empty="strict")


def test_malformed_lines_and_unreadable_files(tmp_path):
    lines = [b'{"text": "one"}', b"{broken", b"[1]", b'{"body": "x"}', b'{"text": 3}', b'{"text": "two"}']
    write(tmp_path, {"a.jsonl": b"\n".join(lines)})
    texts, tally = read([tmp_path])
    assert texts == ["one", "two"]
    assert counts(tally.skipped) == {"not JSON": 1, "not a JSON object": 1, "no string under the key 'text'": 2}
    assert tally.skipped["not JSON"]["examples"] == [f"{tmp_path / 'a.jsonl'}:2"]
    assert read([tmp_path], text_key="body")[0] == ["x"]
    with pytest.raises(UserError, match=r"a\.jsonl:2: not JSON"):
        read([tmp_path], malformed="strict")
    os.symlink(tmp_path / "gone", tmp_path / "b.txt")
    texts, tally = read([tmp_path])
    assert texts == ["one", "two"]
    assert tally.skipped["unreadable (No such file or directory)"]["examples"] == [str(tmp_path / "b.txt")]


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_oversized_documents_are_split_without_loss_at_line_ends(kind: str, tmp_path):
    lines = [f"line {n} " + "é😀"[n % 2] * (n % 40) + "\n" for n in range(300)] + ["日" * 500]
    whole = "".join(lines)
    content = whole.encode() if kind == "text" else json.dumps({"text": whole}).encode() + b"\n"
    write(tmp_path, {"a.txt" if kind == "text" else "a.jsonl": content})
    for limit in (16, 100, 997, 5000):
        texts, tally = read([tmp_path], max_document_bytes=limit)
        assert "".join(texts) == whole
        assert max(len(text.encode()) for text in texts) <= limit
        assert counts(tally.changed) == {"over max_document_bytes, split": 1}
    texts, _ = read([tmp_path], max_document_bytes=997)
    assert sum(text.endswith("\n") for text in texts) >= len(texts) - 3
    texts, tally = read([tmp_path], max_document_bytes=5000, oversized="skip")
    assert (texts, counts(tally.skipped)) == ([], {"over max_document_bytes": 1})
    with pytest.raises(UserError, match="over max_document_bytes"):
        read([tmp_path], max_document_bytes=5000, oversized="strict")
    policies = Policies(max_document_bytes=5000)
    tally = Tally()
    units = list_units([str(tmp_path)], policies, tally, Path("unused"))
    ends = [document.ends for unit in units for document in read_unit(unit, policies, tally)]
    assert ends == [False] * (len(ends) - 1) + [True]


def test_ranges_of_a_jsonl_file_share_its_lines_exactly(tmp_path, monkeypatch):
    texts = [f"document {n} " + "x" * (n * 7 % 50) for n in range(200)]
    write(tmp_path, {"a.jsonl": b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)})
    for size in (1, 13, 64, 1000, 10**6):
        monkeypatch.setattr(sources, "_JSONL_RANGE", size)
        assert read([tmp_path])[0] == texts


TEXT = "größe = 'αβγ 日本'  # note\nprint(größe)\n" * 30
ENCODINGS = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "utf-8-sig"]


def compressed(content: bytes, suffix: str) -> bytes:
    methods = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
    }
    return methods[suffix](content) if suffix else content


def read_plain(folder: Path, copies: Path, **options: object) -> tuple[list[str], Tally]:
    tally, policies = Tally(), Policies(**options)  # type: ignore[arg-type]
    units = list_units([str(folder)], policies, tally, copies)
    return [document.text for unit in units for document in read_unit(unit, policies, tally)], tally


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_utf_16_and_utf_32_are_decoded_with_a_mark_and_without(encoding: str, kind: str, tmp_path):
    texts = [TEXT, "second\n"]
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\r\n\r\n" for text in texts)
    if kind == "text":
        write(tmp_path / "in", {f"{n}.txt": text.encode(encoding) for n, text in enumerate(texts)})
    else:
        write(tmp_path / "in", {"a.jsonl": lines.encode(encoding)})
    found, tally = read_plain(tmp_path / "in", tmp_path / "copies", encoding="strict")
    assert found == texts
    assert not tally.skipped
    assert bool(tally.changed) is (encoding != "utf-8-sig")
    assert all(reason.startswith("decoded from UTF-") for reason in tally.changed)


def test_a_long_utf_16_file_is_split_like_any_other(tmp_path):
    write(tmp_path / "in", {"a.txt": (TEXT * 40).encode("utf-16")})
    texts, _ = read_plain(tmp_path / "in", tmp_path / "copies", max_document_bytes=5000)
    assert "".join(texts) == TEXT * 40
    assert len(texts) > 5


BINARY = {
    "png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\1\0",
    "elf": b"\x7fELF\2\1\1\0\0\0\0\0\0\0\0\0\3\0\x3e\0\1\0\0\0",
    "int16": np.arange(4000, dtype="<i2").tobytes(),
    "float32": np.linspace(-1, 1, 3000, dtype="<f4").tobytes(),
    "random": np.random.default_rng(0).bytes(9000),
    "gzip": gzip.compress(TEXT.encode(), mtime=0),
    "one": b"\0",
    "late": b"header\n" * 2000 + np.random.default_rng(0).bytes(60_000),
    "cp1251": "Съешь же ещё этих мягких французских булок. ".encode("cp1251") * 50,
    "shift-jis": "日本語の文章をここに書きます。".encode("shift-jis") * 50,
}


@pytest.mark.parametrize("name", BINARY)
def test_what_is_no_text_is_left_out_by_name_and_never_becomes_replacement_characters(name: str, tmp_path):
    write(tmp_path, {"a.txt": BINARY[name], "b.txt": TEXT.encode(), "c.txt": "caf\xe9 ".encode("latin-1") * 9})
    texts, tally = read([tmp_path])
    assert texts == [TEXT, "caf\ufffd " * 9]
    [entry] = tally.skipped.values()
    assert entry == {"count": 1, "bytes": len(BINARY[name]), "examples": [str(tmp_path / "a.txt")]}
    with pytest.raises(UserError, match=r"a\.txt: (is binary, not text|byte \d+ is not UTF-8)"):
        read([tmp_path / "a.txt"], encoding="strict")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files_are_read_as_what_is_in_them(suffix: str, tmp_path):
    lines = b'{"text": "one"}\n\n{"text": "two"}\n{broken\n'
    pq.write_table(pa.table({"text": ["table"]}), tmp_path / "t.parquet")
    files = {"a.jsonl": lines, "b.txt": TEXT.encode(), "c.py": TEXT.encode("utf-16"), "d.txt": BINARY["png"]}
    files["e.parquet"] = (tmp_path / "t.parquet").read_bytes()
    write(tmp_path / "in", {f"{name}{suffix}": compressed(content, suffix) for name, content in files.items()})
    texts, tally = read_plain(tmp_path / "in", tmp_path / "copies")
    assert texts == ["one", "two", TEXT, TEXT, "table"]
    folder = tmp_path / "in"
    examples = {reason: entry["examples"] for reason, entry in tally.skipped.items()}
    assert examples == {
        "binary, not text": [str(folder / f"d.txt{suffix}")], "not JSON": [f"{folder / f'a.jsonl{suffix}'}:4"]
    }  # fmt: skip
    copies = {file: file.stat().st_mtime_ns for file in (tmp_path / "copies").rglob("*") if file.is_file()}
    assert read_plain(tmp_path / "in", tmp_path / "copies")[0] == texts
    assert copies == {file: file.stat().st_mtime_ns for file in (tmp_path / "copies").rglob("*") if file.is_file()}


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"no such format"])
def test_a_damaged_compressed_file_is_left_out_whole_or_refused(suffix: str, damage, tmp_path):
    content = compressed(np.random.default_rng(0).bytes(3000).hex().encode(), suffix)
    write(tmp_path / "in", {f"a.txt{suffix}": damage(content), "b.txt": b"b"})
    texts, tally = read_plain(tmp_path / "in", tmp_path / "copies")
    assert texts == ["b"]
    assert tally.skipped["cannot be decoded"]["examples"] == [str(tmp_path / "in" / f"a.txt{suffix}")]
    with pytest.raises(UserError, match=rf"a\.txt{suffix}: cannot be decoded"):
        read_plain(tmp_path / "in", tmp_path / "copies", malformed="strict")


def test_archives_and_other_compressions_are_named_with_what_to_do(tmp_path):
    names = ["a.zip", "b.tar.gz", "c.tgz", "d.jsonl.lz4", "e.gz", "f.png"]
    write(tmp_path, dict.fromkeys(names, b"xxx"))
    tally = read([tmp_path])[1]
    assert {reason.split(":")[0]: entry["count"] for reason, entry in tally.skipped.items()} == {
        "archive": 3, "compressed in a way that is not read": 1,
        "compressed, but its name says not what": 1, "unsupported suffix": 1,
    }  # fmt: skip
    assert all(entry["bytes"] == 3 * entry["count"] for entry in tally.skipped.values())
    for name, message in (("b.tar.gz", "archive: unpack it"), ("e.gz", "rename it"), ("d.jsonl.lz4", "unpack")):
        with pytest.raises(UserError, match=rf"{name} is .*{message}"):
            read([tmp_path / name])


def test_notebooks_give_the_sources_of_their_cells(tmp_path):
    output = {"output_type": "stream", "text": ["not this"]}
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "prose \u00e4"], "metadata": {}},
        {"cell_type": "code", "source": "x = 1\nprint(x)\n", "outputs": [output]},
        {"cell_type": "code", "source": []},
        {"cell_type": "raw", "source": "not this"},
    ]
    old = [{"cell_type": "code", "input": ["y = 2"], "outputs": [output]}, *cells[:1]]
    files = {
        "a.ipynb": json.dumps({"nbformat": 4, "cells": cells, "metadata": {}}),
        "b.ipynb": json.dumps({"nbformat": 3, "worksheets": [{"cells": old}]}),
        "c.ipynb": json.dumps({"nbformat": 4, "cells": []}),
        "d.ipynb": '{"cells": 3}',
        "e.ipynb": "{broken",
        "f.ipynb": "[1]",
    }
    write(tmp_path, {name: content.encode() for name, content in files.items()})
    texts, tally = read([tmp_path], max_document_bytes=100)
    assert texts == ["# Title\nprose \u00e4\n\nx = 1\nprint(x)\n", "y = 2\n\n# Title\nprose \u00e4\n"]
    assert counts(tally.skipped) == {"empty": 1, "no Jupyter notebook": 3}


def test_bad_lines_are_named_by_their_number_in_every_range(tmp_path, monkeypatch):
    lines = [b'{"text": "x"}', b"", b"{broken", b'{"text": "' + b"y" * 50 + b'"}', b"[]"] * 20
    write(tmp_path, {"a.jsonl": b"\n".join(lines)})
    bad = [number for number, line in enumerate(lines, 1) if line in (b"{broken", b"[]")]
    for size in (1, 7, 64, 10**6):
        monkeypatch.setattr(sources, "_JSONL_RANGE", size)
        tally = Tally()
        seen: list[str] = []
        monkeypatch.setattr(tally, "skip", lambda reason, name, *_, seen=seen: seen.append(name))
        units = list_units([str(tmp_path)], Policies(), tally, Path("unused"))
        documents = [document for unit in units for document in read_unit(unit, Policies(), tally)]
        assert len(documents) == 40
        assert seen == [f"{tmp_path / 'a.jsonl'}:{number}" for number in bad]
