import gzip
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from datamodules.text import files
from datamodules.text.corpus import Corpus
from datamodules.text.policies import Policies
from datamodules.text.preparation import Preparation, describe, prepare_corpus
from datamodules.tokenizer import Tokenizer
from modules.errors import UserError
from tests.datamodules.conftest import small


def tree(folder: Path) -> dict[str, str]:
    """Names and digests of all files."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def read_pieces(folder: Path, split: str) -> list[tuple[int, ...]]:
    """All document pieces in all rows."""
    reader = Corpus(str(folder)).rows(split)
    pieces = []
    for row in range(len(reader)):
        tokens, lengths = (tensor.tolist() for tensor in reader.read(row))
        position = 0
        for length in lengths:
            pieces.append(tuple(tokens[position : position + length]))
            position += length
        assert set(tokens[position:]) <= {0}
    return pieces


def expected_pieces(texts: list[str], tokenizer: Tokenizer, length: int) -> Counter:
    pieces = Counter()
    for text in texts:
        ids = [*tokenizer.encode(text), 2]
        pieces.update(tuple(ids[start : start + length]) for start in range(0, len(ids), length))
    return pieces


def test_rows_hold_every_document_byte_for_byte(documents: list[str], corpus_folder: Path):
    metadata = json.loads((corpus_folder / "corpus.json").read_text())
    tokenizer = Tokenizer.load(corpus_folder / "tokenizer")
    kept = list(dict.fromkeys(text for text in documents if text.strip()))
    held_out = [text for text in kept if place(text) < 0.15]
    assert 20 < len(held_out) < 80
    for split, texts in (("validation", held_out), ("train", [text for text in kept if text not in set(held_out)])):
        pieces = read_pieces(corpus_folder, split)
        assert Counter(pieces) == expected_pieces(texts, tokenizer, 64)
        assert metadata[split]["documents"] == len(texts)
        assert metadata[split]["bytes"] == sum(len(text.encode()) for text in texts)
        assert metadata[split]["tokens"] == sum(map(len, pieces))
        assert sum(map(len, pieces)) / (64 * metadata[split]["rows"]) == metadata[split]["packing_use"]
        for text in texts:
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert metadata["documents"] == len(kept)
    assert metadata["skipped"].get("duplicate", {"count": 0})["count"] == len(documents) - len(kept)
    assert len(list((corpus_folder / "train").glob("chunk-*"))) > 5
    assert not (corpus_folder / ".preparation").exists()
    assert describe(metadata).count("\n") > 4


def test_openings_are_the_beginnings_of_held_out_documents(documents: list[str], corpus_folder: Path):
    metadata = json.loads((corpus_folder / "corpus.json").read_text())
    openings = json.loads((corpus_folder / "openings.json").read_text())
    tokenizer = Tokenizer.load(corpus_folder / "tokenizer")
    assert len(openings) == min(64, metadata["validation"]["documents"])
    held_out = [text for text in documents if place(text) < 0.15]
    for ids in openings:
        assert any(
            tokenizer.decode(ids).removesuffix("</s>") == text[: len(tokenizer.decode(ids))] for text in held_out
        )


def place(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def test_gzip_figure_is_that_of_the_held_out_files_in_order(tmp_path):
    (tmp_path / "in").mkdir()
    generator = random.Random(0)
    texts = ["".join(generator.choices("abcdefgh \n", k=2000)) * 2 for _ in range(60)]
    for number, text in enumerate(texts):
        (tmp_path / "in" / f"{number:03d}.txt").write_text(text)
    corpus, _ = prepare_corpus(small(tmp_path / "in", tmp_path / "out", validation_fraction=0.2))
    chosen = "".join(text for text in texts if place(text) < 0.2)
    assert corpus["validation"]["bytes"] == len(chosen) > 20_000
    assert corpus["gzip_bits_per_byte"] == 8 * len(gzip.compress(chosen.encode(), 9, mtime=0)) / len(chosen)


def test_the_result_depends_on_nothing_but_sources_and_options(sources: Path, corpus_folder: Path, tmp_path):
    shutil.copytree(sources, tmp_path / "copy")
    expected = tree(corpus_folder)
    prepare_corpus(small(sources, tmp_path / "parallel", workers=2))
    assert tree(tmp_path / "parallel") == expected
    moved, _ = prepare_corpus(small(tmp_path / "copy", tmp_path / "moved"))
    different = {name for name, digest in tree(tmp_path / "moved").items() if digest != expected[name]}
    assert different <= {"corpus.json", "sources.json"}  # which name the folder
    other, _ = prepare_corpus(small(sources, tmp_path / "seed", seed=1))
    assert moved["fingerprint"] == other["fingerprint"]
    assert tree(tmp_path / "seed")["train/chunk-0-0.bin"] != expected["train/chunk-0-0.bin"]


def test_a_finished_corpus_is_returned_at_once_and_other_options_are_refused(
    sources: Path, corpus_folder: Path, tmp_path
):
    before = tree(corpus_folder)
    (corpus_folder / ".preparation").mkdir()  # killed between the last file and the clean-up
    corpus, complete = prepare_corpus(small(sources, corpus_folder, workers=2))
    assert complete
    assert corpus["sequence_length"] == 64
    assert tree(corpus_folder) == before
    assert not (corpus_folder / ".preparation").exists()
    for key, value in (("sequence_length", 32), ("seed", 3), ("validation_fraction", 0.5), ("vocab_size", 401)):
        with pytest.raises(UserError, match=f"^{key}: .* was prepared with .*, not {value}; "):
            prepare_corpus(small(sources, corpus_folder, **{key: value}))
    with pytest.raises(UserError, match=r"^paths: "):
        prepare_corpus(small(tmp_path, corpus_folder))


def interrupt_after(monkeypatch: pytest.MonkeyPatch, writes: int, error: BaseException) -> None:
    """Make the n-th file that is written fail after its temporary file was made."""
    left = [writes]
    real = files.os.fsync

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise error
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)


@pytest.mark.parametrize("writes", [0, 1, 2, 5, 14, 23])
def test_an_interrupted_preparation_continues_to_the_same_bytes(
    writes: int, sources: Path, corpus_folder: Path, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "out"
    interrupt_after(monkeypatch, writes, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(small(sources, output))
    assert not (output / "corpus.json").exists()
    monkeypatch.undo()
    _, complete = prepare_corpus(small(sources, output))
    assert not complete
    assert tree(output) == tree(corpus_folder)
    assert ("shards were done before" in capsys.readouterr().out) == (writes >= 5)


def test_sources_that_change_in_between_are_refused(sources: Path, tmp_path, monkeypatch):
    shutil.copytree(sources, tmp_path / "in")
    interrupt_after(monkeypatch, 9, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(small(tmp_path / "in", tmp_path / "out"))
    monkeypatch.undo()
    (tmp_path / "in" / "new.txt").write_text("a new document")
    with pytest.raises(UserError, match=r"^output: the sources changed"):
        prepare_corpus(small(tmp_path / "in", tmp_path / "out"))
    with pytest.raises(UserError, match=r"^seed: "):
        prepare_corpus(small(tmp_path / "in", tmp_path / "out", seed=9))


def test_a_full_disk_is_one_error_and_what_is_written_stays(sources: Path, corpus_folder: Path, tmp_path, monkeypatch):
    output = tmp_path / "out"
    interrupt_after(monkeypatch, 12, OSError(28, "No space left on device"))
    with pytest.raises(
        ValueError, match=r"cannot write .*: No space left on device; .*run the same command again"
    ) as error:
        prepare_corpus(small(sources, output))
    assert "\n" not in str(error.value)
    assert not list(output.rglob("*.partial*"))
    assert list(output.rglob("shard-*.json"))
    monkeypatch.undo()
    prepare_corpus(small(sources, output))
    assert tree(output) == tree(corpus_folder)


def test_a_real_write_error_in_a_worker_process_arrives_as_one_line(sources: Path, tmp_path):
    code = f"""
from pathlib import Path
from datamodules.text.policies import Policies
from datamodules.text.preparation import Preparation, prepare_corpus
if __name__ == "__main__":
    options = dict(sequence_length=64, vocab_size=400, shard_bytes=20_000, workers=2)
    try:
        prepare_corpus(Preparation(paths=[{str(sources)!r}], output=Path({str(tmp_path / "out")!r}), **options))
    except ValueError as error:
        print("error:", error)
"""
    (tmp_path / "driver.py").write_text(code)
    limit = 12_000  # bytes a file may have: less than a chunk, more than a report; the tokenizer is there before

    (tmp_path / "out" / ".preparation").mkdir(parents=True)
    prepare_corpus(small(sources, tmp_path / "full", shard_bytes=20_000))
    shutil.copytree(tmp_path / "full" / "tokenizer", tmp_path / "out" / "tokenizer")
    result = subprocess.run(
        [sys.executable, str(tmp_path / "driver.py")],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(Path(__file__).parents[3]), "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert "error: cannot write" in result.stdout, result
    assert "File too large" in result.stdout
    assert not list((tmp_path / "out").rglob("*.partial*"))


def test_two_preparations_of_one_folder_are_refused(sources: Path, tmp_path):
    import fcntl
    import os

    output = tmp_path / "out"
    (output / ".preparation").mkdir(parents=True)
    descriptor = os.open(output, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(UserError, match="another process is preparing"):
            prepare_corpus(small(sources, output))
    finally:
        os.close(descriptor)


def test_foreign_folders_and_files_are_left_alone(sources: Path, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"^output: .* holds no corpus"):
        prepare_corpus(small(sources, tmp_path / "mine"))
    with pytest.raises(UserError, match=r"^output: "):
        prepare_corpus(small(sources, tmp_path / "mine" / "thesis.txt"))
    assert [file.name for file in tmp_path.rglob("*")] == ["mine", "thesis.txt"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": b"a"}, "^paths: 1 document of 1 bytes in all is too little"),
        ({"a.txt": b"same", "b.txt": b"same"}, "^paths: 1 document of 8 bytes"),
        ({"a.txt": b""}, r"^paths: no document in .* \(1 empty\)"),
        ({"a.png": b"x"}, r"^paths: no document in .* \(1 unsupported suffix\)"),
        ({}, r"^paths: no document in .* \(nothing there\)"),
    ],
)
def test_too_little_text_is_refused_and_leaves_nothing_behind(files: dict, message: str, tmp_path):
    (tmp_path / "in").mkdir()
    for name, content in files.items():
        (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare_corpus(Preparation(paths=[str(tmp_path / "in")], output=tmp_path / "out", workers=1))
    assert not (tmp_path / "out").exists()


def test_one_byte_is_a_corpus_when_nothing_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a")
    options = {"validation_fraction": 0.0, "workers": 1, "sequence_length": 8}
    corpus, _ = prepare_corpus(Preparation(paths=[str(tmp_path / "a.txt")], output=tmp_path / "out", **options))
    assert (corpus["bytes"], corpus["tokens"], corpus["train"]["rows"]) == (1, 2, 1)
    assert corpus["gzip_bits_per_byte"] is None
    assert not (tmp_path / "out" / "validation" / "index.json").exists()


def test_a_single_long_file_is_split_so_that_some_of_it_can_be_held_out(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"chapter {n}, words and words\n" for n in range(2000)))
    output = tmp_path / "out"
    options = small(tmp_path / "book.txt", output, policies=Policies(max_document_bytes=5000), validation_fraction=0.01)
    corpus, _ = prepare_corpus(options)
    assert corpus["validation"]["documents"] >= 1
    assert corpus["bytes"] == (tmp_path / "book.txt").stat().st_size
    ends = [piece[-1] == 2 for split in ("train", "validation") for piece in read_pieces(output, split)]
    assert sum(ends) == 1  # the pieces are no ends of text


def test_a_given_tokenizer_is_used_and_travels_along(sources: Path, corpus_folder: Path, tmp_path):
    given = corpus_folder / "tokenizer"
    corpus, _ = prepare_corpus(small(sources, tmp_path / "out", tokenizer=given, sequence_length=32))
    assert tree(tmp_path / "out" / "tokenizer") == tree(given)
    moved = shutil.copytree(given, tmp_path / "moved")
    again, complete = prepare_corpus(small(sources, tmp_path / "out", tokenizer=Path(moved), sequence_length=32))
    assert complete
    assert again == corpus


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sequence_length", 1),
        ("vocab_size", 287),
        ("validation_fraction", 1.0),
        ("shard_bytes", 0),
        ("workers", 0),
    ],
)
def test_options_out_of_range_are_named(key: str, value: float, sources: Path, tmp_path):
    with pytest.raises(UserError, match=f"^{key}: "):
        small(sources, tmp_path / "out", **{key: value})


def test_a_corpus_within_its_sources_is_none_of_them(sources: Path, tmp_path):
    options = {"sequence_length": 64, "vocab_size": 300, "workers": 1}
    texts = Path(shutil.copytree(sources, tmp_path / "texts"))
    first, _ = prepare_corpus(Preparation(paths=[str(texts)], output=tmp_path / "beside", **options))
    inside = Preparation(paths=[str(texts)], output=texts / "deep" / "corpus", **options)
    assert prepare_corpus(inside)[0]["fingerprint"] == first["fingerprint"]
    assert prepare_corpus(inside)[0]["fingerprint"] == first["fingerprint"], "again: nothing to do"


def test_sources_that_changed_since_are_named_and_nothing_is_touched(sources: Path, tmp_path, capsys):
    given, output = tmp_path / "in", tmp_path / "out"
    shutil.copytree(sources, given)
    prepare_corpus(small(given, output))
    before = tree(output)
    files = sorted(given.rglob("*.txt"))
    files[0].write_text("other text of another size")
    files[1].unlink()
    for number in range(5):
        (given / f"new{number}.txt").write_text("new")
    with pytest.raises(UserError) as error:
        prepare_corpus(small(given, output))
    added = ", ".join(str(given / f"new{number}.txt") for number in range(3))
    assert str(error.value) == (
        f"output: the sources changed since {output} was prepared: 5 added ({added} and 2 more), "
        f"1 removed ({files[1]}), 1 changed ({files[0]}); give another --output, or delete {output} to prepare it anew"
    )
    assert tree(output) == before


def test_only_the_text_of_the_sources_counts_where_times_differ(sources: Path, tmp_path):
    given, output = tmp_path / "in", tmp_path / "out"
    shutil.copytree(sources, given)
    prepare_corpus(small(given, output))
    file = min(given.rglob("*.txt"))
    text = file.read_text()
    os.utime(file, (1, 1))
    assert prepare_corpus(small(given, output))[1]
    file.write_text(text[:-1] + ("y" if text[-1] == "x" else "x"))  # as long as before
    with pytest.raises(UserError, match=rf"the sources changed .*: 1 changed \({file}\); give another"):
        prepare_corpus(small(given, output))


def test_a_corpus_of_an_earlier_version_is_complete_and_says_that_it_is_not_compared(sources: Path, tmp_path, capsys):
    prepare_corpus(small(sources, tmp_path / "out"))
    (tmp_path / "out" / "sources.json").unlink()
    assert prepare_corpus(small(sources, tmp_path / "out"))[1]
    assert "kept no list of its sources: they are not compared" in capsys.readouterr().out


def test_nothing_is_listed_with_0_bytes(tmp_path):
    (tmp_path / "in" / ".git").mkdir(parents=True)
    for name, content in (("a.txt", b"a" * 99), ("b.txt", b"b" * 99), ("c.png", b"1234"), ("d.txt", b"")):
        (tmp_path / "in" / name).write_bytes(content)
    corpus, _ = prepare_corpus(Preparation(paths=[str(tmp_path / "in")], output=tmp_path / "out", workers=1))
    text = describe(corpus)
    assert "unsupported suffix (4 bytes): " in text
    assert "hidden folder: " in text
    assert "empty: " in text
    assert "(0 bytes)" not in text
