"""What is calibrated on and what is held out, of corpora and of files."""

import gzip
import json
from pathlib import Path

import pytest

from app.quantization.texts import missing_data, read_texts
from datamodules.text.corpus import Corpus
from datamodules.text.preparation import Preparation, prepare_corpus
from datamodules.tokenizer import Tokenizer
from modules.checkpoints.source import open_model
from modules.errors import UserError
from tests.modules.checkpoints.folders import write_fit_folder, write_hf_folder, write_tokenizer
from tests.modules.helpers import make_network, tiny_config


def prepared(folder: Path, tokenizer: Path | None, validation_fraction: float = 0.2, length: int = 32) -> Path:
    texts = folder / "texts"
    texts.mkdir(exist_ok=True)
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"def f{number}(a):\n    return {number} + a\n" * (1 + number % 5))
    output = folder / f"corpus-{validation_fraction}"
    prepare_corpus(
        Preparation(
            paths=[str(texts)],
            output=output,
            sequence_length=length,
            tokenizer=tokenizer,
            validation_fraction=validation_fraction,
            workers=1,
        )
    )
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def source(folder: Path):
    return open_model(write_hf_folder(folder / "model", make_network(tiny_config(vocab_size=320)), tokenizer=True))


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Path:
    return prepared(folder, folder / "tokenizer")


def documents(corpus: Path, split: str) -> list[list[int]]:
    """All documents of a split, row by row."""
    reader = Corpus(str(corpus)).rows(split)
    found = []
    for number in range(len(reader)):
        row, lengths = reader.read(number)
        start = 0
        for length in lengths.tolist():
            found.append(row[start : start + length].tolist())
            start += length
    return found


def test_of_a_corpus_training_and_held_out_documents_are_taken(source, corpus):
    texts = read_texts(source, str(corpus), 10**6, 10**6)
    assert texts is not None
    assert texts.calibration == [row for row in documents(corpus, "train") if len(row) > 1]
    assert texts.held_out == [row for row in documents(corpus, "validation") if len(row) > 1]
    assert texts.origin == f"{corpus.name}: training rows, and held-out rows"


def test_numbers_of_tokens_are_kept_to_and_rows_are_spread(source, corpus):
    texts = read_texts(source, str(corpus), 100, 50)
    assert texts is not None
    assert 90 < sum(map(len, texts.calibration)) <= 100
    assert 40 < sum(map(len, texts.held_out)) <= 50
    everything = documents(corpus, "train")
    assert texts.calibration[0] == everything[0]
    late = everything[len(everything) // 2 :]
    assert any(row[: len(texts.calibration[-1])] == texts.calibration[-1] for row in late)


def test_a_corpus_without_held_out_rows_is_split(source, folder):
    corpus = prepared(folder, folder / "tokenizer", validation_fraction=0.0)
    texts = read_texts(source, str(corpus), 10**6, 10**6)
    assert texts is not None
    assert "no held-out rows" in texts.origin
    assert not set(map(tuple, texts.calibration)) & set(map(tuple, texts.held_out))
    assert len(texts.calibration) > 5 * len(texts.held_out) > 0


def test_of_a_jsonl_file_every_tenth_row_is_held_out_and_its_likes_are_left_out(source, tmp_path):
    texts = [f"row {number}" for number in range(25)]
    texts[3] = texts[9]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = read_texts(source, str(tmp_path / "in.jsonl"), 10**6, 10**6)
    assert found is not None
    encode = Tokenizer.load(source.tokenizer_folder).encode_prompt
    assert found.held_out == [encode(texts[9]), encode(texts[19])]
    assert found.calibration == [encode(text) for number, text in enumerate(texts) if number not in (3, 9, 19)]


def test_a_text_file_is_cut_into_rows(source, tmp_path):
    (tmp_path / "in.txt").write_text("def main():\n    return 1\n" * 400)
    found = read_texts(source, str(tmp_path / "in.txt"), 10**6, 10**6)
    assert found is not None
    assert max(map(len, found.calibration)) == 512
    assert len(found.held_out) >= 1


def test_without_data_the_runs_corpus_is_taken_if_it_is_there(folder, corpus, tmp_path, monkeypatch):
    network = make_network(tiny_config(vocab_size=288))
    run = open_model(write_fit_folder(tmp_path / "step=1", network, tokenizer=True))
    monkeypatch.chdir(tmp_path)
    assert read_texts(run, None, 100, 100) is None
    assert "the run's corpus somewhere/of/mine/corpus is not here" in str(missing_data(run))
    (tmp_path / "somewhere/of/mine").mkdir(parents=True)
    (tmp_path / "somewhere/of/mine/corpus").symlink_to(corpus)
    found = read_texts(run, None, 100, 100)
    assert found is not None
    assert found.origin.startswith("corpus: ")


def test_a_model_that_names_no_corpus_needs_data(source):
    assert read_texts(source, None, 100, 100) is None
    assert "names no corpus; give a folder that prepare wrote" in str(missing_data(source))


def test_data_of_another_tokenizer_or_vocabulary_is_refused_by_name(source, folder, tmp_path):
    Tokenizer.train(["other texts altogether " * 9], 300).save(tmp_path / "tokenizer")
    other = prepared(tmp_path, tmp_path / "tokenizer")
    with pytest.raises(UserError, match=f"--data: {other} was prepared with another tokenizer than that of"):
        read_texts(source, str(other), 100, 100)
    small = open_model(write_hf_folder(tmp_path / "small", make_network(tiny_config(vocab_size=290))))
    with pytest.raises(UserError, match=rf"--data: {other} has a vocabulary of 300, {small.path} one of 290"):
        read_texts(small, str(other), 100, 100)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("one.jsonl", b'{"text": "a b c"}\n', "has too few rows"),
        ("empty.txt", b"", "has too few rows"),
        ("latin.txt", b"caf\xe9", "is no UTF-8 text"),
        ("bad.jsonl", b'{"txt": "a"}\n', "bad.jsonl:1: a row needs text"),
    ],
)
def test_files_that_do_not_do_are_refused(source, tmp_path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_texts(source, str(tmp_path / name), 100, 100)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_compressed_and_utf_16_files_are_texts_too(source, tmp_path, name: str):
    lines = "".join(f'{{"text": "row {n} of some text"}}\n\n' for n in range(20))
    (tmp_path / name).write_text(lines)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(lines.encode("utf-16")))
    plain, packed = (read_texts(source, str(tmp_path / file), 100, 100) for file in (name, f"{name}.gz"))
    assert plain is not None
    assert packed is not None
    assert plain[:2] == packed[:2]


def test_a_folder_that_is_no_corpus_and_a_file_that_is_not_there(source, tmp_path):
    with pytest.raises(UserError, match="is neither a file nor a folder that prepare wrote"):
        read_texts(source, str(tmp_path), 100, 100)
    with pytest.raises(UserError, match="is neither a file nor a folder that prepare wrote"):
        read_texts(source, str(tmp_path / "nowhere"), 100, 100)
