import json
import os
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from datamodules.text import corpus
from datamodules.text.corpus import Corpus
from modules.errors import UserError


@pytest.fixture
def folder(corpus_folder: Path, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(corpus_folder, tmp_path / "corpus"))


def test_rows_are_read_in_any_order_without_threads_or_growth(corpus_folder: Path):
    reader = Corpus(str(corpus_folder)).rows("train")
    assert len(reader) == sum(reader.chunk_rows) > 50
    threads = threading.active_count()
    in_order = [reader.read(n) for n in range(len(reader))]
    files = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    for _ in range(3):
        for n in np.random.default_rng(0).permutation(len(reader)).tolist():
            tokens, lengths = reader.read(n)
            assert np.array_equal(tokens, in_order[n][0])
            assert np.array_equal(lengths, in_order[n][1])
    assert threading.active_count() == threads
    if files:
        assert len(os.listdir("/proc/self/fd")) <= files + 8
    assert tokens.dtype == lengths.dtype == np.int32
    assert sorted(os.listdir(corpus_folder / "train")) == sorted(
        [f"chunk-{n}-0.bin" for n in range(len(reader.chunk_rows))] + ["index.json"]
    )


def test_a_reader_can_be_sent_to_another_process(corpus_folder: Path):
    reader = Corpus(str(corpus_folder)).rows("train")
    first = reader.read(3)
    copy = pickle.loads(pickle.dumps(reader))
    assert np.array_equal(copy.read(3)[0], first[0])


def test_urls_are_read_through_litdata(corpus_folder: Path, tmp_path, monkeypatch):
    monkeypatch.setattr("litdata.utilities.dataset_utilities.get_default_cache_dir", lambda: str(tmp_path / "cache"))
    remote, local = Corpus(f"local:{corpus_folder}"), Corpus(str(corpus_folder))
    assert remote.metadata == local.metadata
    assert remote.openings() == local.openings()
    assert remote.tokenizer.encode("def f") == local.tokenizer.encode("def f")
    theirs, ours = remote.rows("validation"), local.rows("validation")
    assert len(theirs) == len(ours)
    for row in (len(ours) - 1, 0, len(ours) // 2):
        assert np.array_equal(theirs.read(row)[0], ours.read(row)[0])
    with pytest.raises(UserError, match=r"local:.*nowhere/corpus\.json cannot be read"):
        Corpus(f"local:{corpus_folder}/nowhere")


def test_few_chunks_are_open_at_a_time_and_those_of_a_url_leave_the_disk(corpus_folder: Path, tmp_path, monkeypatch):
    monkeypatch.setattr("litdata.utilities.dataset_utilities.get_default_cache_dir", lambda: str(tmp_path / "cache"))
    monkeypatch.setattr("datamodules.text.corpus._OPEN_CHUNKS", 3)
    far, near = Corpus(f"local:{corpus_folder}").rows("train"), Corpus(str(corpus_folder)).rows("train")
    kept = [near.read(row)[0] for row in range(len(near))]
    for row in [*range(len(near)), *reversed(range(len(near)))]:
        tokens, _ = far.read(row)
        assert np.array_equal(tokens, kept[row])
        assert len(list((tmp_path / "cache").rglob("chunk-*.bin"))) <= 3
    assert len(far._open) == len(near._open) == 3


@pytest.mark.parametrize("evictions", [1, 3])
def test_a_chunk_that_another_process_removes_before_it_is_mapped_is_downloaded_again(
    evictions: int, corpus_folder: Path, tmp_path, monkeypatch
):
    monkeypatch.setattr("litdata.utilities.dataset_utilities.get_default_cache_dir", lambda: str(tmp_path / "cache"))
    far, near = Corpus(f"local:{corpus_folder}").rows("train"), Corpus(str(corpus_folder)).rows("train")
    download, downloads = corpus._download_once, []

    def download_and_lose(url: str, file: Path, required: bool = True) -> None:
        download(url, file, required)
        downloads.append(url)
        if len(downloads) <= evictions:  # the other process is at its eviction here
            file.unlink()

    monkeypatch.setattr(corpus, "_download_once", download_and_lose)
    assert np.array_equal(far.read(0)[0], near.read(0)[0])
    assert len(downloads) == evictions + 1


def test_a_chunk_that_never_stays_is_an_error_in_the_end(corpus_folder: Path, tmp_path, monkeypatch):
    monkeypatch.setattr("litdata.utilities.dataset_utilities.get_default_cache_dir", lambda: str(tmp_path / "cache"))
    far = Corpus(f"local:{corpus_folder}").rows("train")
    monkeypatch.setattr(corpus, "_download_once", lambda *_: None)
    with pytest.raises(UserError, match=r"is removed from the cache as soon as it is there"):
        far.read(0)


def damage(file: Path, at: int, data: bytes) -> None:
    content = bytearray(file.read_bytes())
    content[at : at + len(data)] = data
    file.write_bytes(bytes(content))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES = {
    "corpus.json is missing": (lambda f: (f / "corpus.json").unlink(), r"corpus\.json does not exist"),
    "corpus.json is cut": (lambda f: cut_text(f / "corpus.json"), r"corpus\.json cannot be read"),
    "another format": (lambda f: edit(f / "corpus.json", format_version=99), r"corpus\.json: format_version"),
    "the index is missing": (lambda f: (f / "train/index.json").unlink(), r"train/index\.json does not exist"),
    "the index is cut": (lambda f: cut_text(f / "train/index.json"), r"train/index\.json cannot be read"),
    "rows do not add up": (lambda f: edit(f / "train/index.json", chunks=[]), r"train/index\.json: its rows are not"),
    "a chunk is missing": (lambda f: (f / "train/chunk-2-0.bin").unlink(), r"train/chunk-2-0\.bin is missing"),
    "a chunk is cut": (lambda f: cut(f / "train/chunk-2-0.bin"), r"train/chunk-2-0\.bin has \d+ bytes instead of"),
    "the tokenizer is missing": (lambda f: shutil.rmtree(f / "tokenizer"), r"tokenizer is not a folder"),
    "another tokenizer": (lambda f: other_tokenizer(f / "tokenizer"), "is not the tokenizer the corpus was made with"),
}


def cut_text(file: Path) -> None:
    file.write_text(file.read_text()[:40])


def other_tokenizer(folder: Path) -> None:
    from datamodules.tokenizer import Tokenizer

    Tokenizer.train(["another text"], 300).save(folder.parent / "new")
    shutil.copyfile(folder.parent / "new" / "tokenizer.json", folder / "tokenizer.json")


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_at_the_start(name: str, folder: Path):
    act, message = DAMAGES[name]
    act(folder)
    with pytest.raises(UserError, match=message) as error:
        Corpus(str(folder)).rows("train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("at", "data"),
    [
        (4, b"\xff\xff\xff\xff"),  # the offset of the first row
        (4, b"\x10\x00\x00\x00"),
        ("first row", b"\xff\xff\xff\x7f"),  # bytes of its first array
        ("first row", b"\x04\x00\x00\x00"),
        ("first token", b"\x21"),
        ("first length", b"\x00"),
    ],
)
def test_damage_inside_a_chunk_is_found_when_the_row_is_read(at: int | str, data: bytes, folder: Path):
    file = folder / "train" / "chunk-0-0.bin"
    row = int(np.frombuffer(file.read_bytes()[4:8], dtype="<u4")[0])
    places = {"first row": row, "first token": row + 12, "first length": row + 12 + 4 * 64}
    damage(file, places.get(at, at), data)  # type: ignore[arg-type]
    reader = Corpus(str(folder)).rows("train")
    with pytest.raises(UserError, match=r"train/chunk-0-0\.bin: row 0 cannot be read \(.*corrupt") as error:
        reader.read(0)
    assert "\n" not in str(error.value)
