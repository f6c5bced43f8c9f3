"""Rows in, answers out, and a second start that goes on."""

import gzip
import json
from pathlib import Path

import pytest

from app.options import STDOUT
from app.rows_file import Answers, open_answers, read_rows, text_of
from modules.errors import UserError

ROWS = [{"text": "a"}, {"text": "\u00e4\u2028b"}, {"text": "c"}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return file


def test_rows_are_read(source: Path) -> None:
    assert read_rows(source) == {f"{source}:{number}": row for number, row in enumerate(ROWS, 1)}


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_blank_lines_encodings_and_compression_change_no_row_and_no_line_number(
    tmp_path: Path, ending: str, encoding: str, suffix: str
) -> None:
    import pyarrow as pa

    lines = ["", *(json.dumps(row, ensure_ascii=False) for row in ROWS), " \t", ""]
    lines.insert(2, "")
    content = ending.join(lines).encode(encoding)
    compress = {"": bytes, ".gz": gzip.compress, ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True)}
    file = tmp_path / f"in.jsonl{suffix}"
    file.write_bytes(compress[suffix](content))
    assert read_rows(file) == {f"{file}:{number}": row for number, row in zip((2, 4, 5), ROWS, strict=True)}


@pytest.mark.parametrize(
    "content", [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", gzip.compress(b'{"text": "a"}'), b"\xff\xfe{\0}"]
)
def test_what_is_no_text_is_told_in_one_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"in\.jsonl cannot be read .*; give a file of UTF-8 text$"):
        read_rows(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ('{"text": "a"}\n{"text": \n', ":2: not JSON"),
        ('{"text": "a"}\n\n{"text": "b"\n', ":3: not JSON"),
        ("\n \n", "has no rows"),
        ('{"text": "a", "x": [NaN]}\n', ":1: a value is NaN"),
        ('{"text": "a"}\n{"x": 1e999}\n', ":2: a value is NaN or an infinite"),
        ('{"text": "a", "x": "\\ud800"}\n', r":1: a text has \\ud800, half of a character"),
        ('{"text": "a"}\n["b"]\n', ":2: not a JSON object; each line must be one object"),
    ],
)
def test_a_broken_row_is_named_by_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        read_rows(file)


@pytest.mark.parametrize("value", [1, None, ["a"], "\ud800"])
def test_what_is_no_text_is_named(value: object) -> None:
    with pytest.raises(UserError, match="file:3: text "):
        text_of({"text": value}, "text", "file:3")


def test_a_second_start_goes_on_after_the_last_complete_line(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "folder" / "out.jsonl"
    answers = Answers(output, source, {"model": "m"})
    answers.append(ROWS[:2])
    with output.open("ab") as file:
        file.write(b'{"text": "c')
    again = Answers(output, source, {"model": "m"})
    assert (again.count, again.summary) == (2, None)
    again.append(ROWS[2:])
    again.finish({"rows": 3})
    assert list(again.read()) == list(read_rows(output).values()) == ROWS
    finished = Answers(output, source, {"model": "m"})
    assert (finished.count, finished.summary) == (3, {"rows": 3})


def test_nothing_appears_before_the_first_answer(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "folder" / "out.jsonl"
    answers = Answers(output, source, {})
    assert list(output.parent.iterdir()) == []
    answers.append(ROWS[:1])
    assert sorted(path.name for path in output.parent.iterdir()) == ["out.jsonl", "out.jsonl.run.json"]


def test_another_command_adds_nothing(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    Answers(output, source, {"model": "m"}).append(ROWS[:1])
    before = output.read_bytes()
    with pytest.raises(UserError, match="begun with model m, not n"):
        Answers(output, source, {"model": "n"})
    source.write_text('{"text": "other"}\n')
    with pytest.raises(UserError, match="another input_sha256"):
        Answers(output, source, {"model": "m"})
    assert output.read_bytes() == before


def test_a_file_of_others_is_left_alone(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("precious\n")
    with pytest.raises(UserError, match="exists"):
        Answers(output, source, {})
    assert output.read_text() == "precious\n"
    with pytest.raises(UserError, match="is the input"):
        Answers(source, source, {})


def test_answers_to_standard_output_leave_nothing_else(source: Path, tmp_path: Path, capfdbinary) -> None:
    answers = open_answers(STDOUT, source, {})
    answers.append(ROWS[:2])
    answers.append(ROWS[2:])
    answers.finish({"rows": 3})
    written = capfdbinary.readouterr().out
    assert [json.loads(line) for line in written.decode().split("\n")[:-1]] == list(answers.read()) == ROWS
    assert answers.count == 3
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_pipe_is_read_once_and_written_to(tmp_path: Path) -> None:
    import os
    import threading

    names = [tmp_path / "in", tmp_path / "out"]
    for name in names:
        os.mkfifo(name)
    threading.Thread(target=lambda: names[0].write_text('{"text": "a"}\n'), daemon=True).start()
    assert read_rows(names[0]) == read_rows(names[0]) == {f"{names[0]}:1": {"text": "a"}}
    seen: list[str] = []
    reader = threading.Thread(target=lambda: seen.append(names[1].read_text()), daemon=True)
    reader.start()
    open_answers(names[1], names[0], {}).append([{"text": "b"}])
    reader.join(10)
    assert seen == ['{"text": "b"}\n']
