import os
import sysconfig
from pathlib import Path

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
    import json

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
    import json

    texts = [f"document {n} " + "x" * (n * 7 % 50) for n in range(200)]
    write(tmp_path, {"a.jsonl": b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)})
    for size in (1, 13, 64, 1000, 10**6):
        monkeypatch.setattr(sources, "_JSONL_RANGE", size)
        assert read([tmp_path])[0] == texts
