"""JSONL files that a command reads row by row and answers row by row, going on where it stopped.

Answers are appended in the order of the input, so the number of complete lines says how far a command came. Beside
OUTPUT lies OUTPUT.run.json: what was asked, with a digest of the input, and in the end the summary. By it the same
command knows its own work again, and a different one does not add to it.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.options import STDOUT, read_bytes
from datamodules.text.plain import parse_row, read_plain
from modules.errors import UserError, writing

RUN_SUFFIX = ".run.json"


def read_rows(file: Path) -> dict[str, dict[str, Any]]:
    """Read a JSONL file of objects, plain or compressed; blank lines are passed over.

    Returns:
        Place (FILE:LINE, for messages) -> row, in the order of the file.

    Raises:
        UserError: a line is no JSON object (its place is named), the file cannot be decoded, or has no row.
    """
    rows: dict[str, dict[str, Any]] = {}
    text = read_plain(file, None if file.is_file() else read_bytes(file))
    for number, line in enumerate(text.split(b"\n"), 1):
        where = f"{file}:{number}"
        try:
            row = parse_row(line)
        except ValueError as error:
            reason = f"{error} ({error.__cause__})" if error.__cause__ else str(error)
            raise UserError(f"{where}: {reason}; each line must be one object, like {{...}}") from None
        if row is None:
            continue
        try:
            encode_row(row)
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: a text {_half(error)}") from None
        except ValueError:
            what = "NaN or an infinite number, which JSON has no word for"
            raise UserError(f"{where}: a value is {what}; remove it, or write null") from None
        rows[where] = row
    if not rows:
        raise UserError(f"{file}: the file has no rows")
    return rows


def encode_row(row: dict[str, Any]) -> bytes:
    """Return a row as a line of a file.

    Raises:
        ValueError: it holds a number that is not finite, or a text that UTF-8 cannot hold.
    """
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()


def text_of(row: dict[str, Any], key: str, where: str) -> str:
    """Return the text of a key.

    Args:
        row: the row.
        key: one of its keys.
        where: how to name the row in an error (FILE:LINE).

    Raises:
        UserError: it is no text, or one that UTF-8 cannot hold.
    """
    text = row[key]
    if not isinstance(text, str):
        raise UserError(f"{where}: {key} must be a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if where.startswith("--"):  # bytes of the command line that are not UTF-8 reach Python as these codes
            raise UserError(f"{where}: the text is not UTF-8; set the terminal to UTF-8, or use a file") from None
        raise UserError(f"{where}: {key} {_half(error)}") from None
    return text


def _half(error: UnicodeEncodeError) -> str:
    """Return what a text of a JSON file has that UTF-8 cannot hold."""
    code = f"\\u{ord(error.object[error.start]):04x}"
    return f"has {code}, half of a character that JSON writes as two codes (cut in the middle?); remove it"


def open_answers(output: Path, source: Path, settings: dict[str, Any]) -> "Answers":
    """Return where the answers of a command go; see `Answers` for the arguments.

    Raises:
        UserError: the output holds something else.
    """
    streams = output == STDOUT or (output.exists() and not output.is_file())
    return StreamedAnswers(output) if streams else Answers(output, source, settings)


class Answers:
    """The output of a command: one row for each row of the input, in the same order.

    Both files appear with the first answer: a command that fails before leaves nothing behind.

    Args:
        output: JSONL file to write or to go on with.
        source: the input file.
        settings: what else decides the answers, JSON values; a file begun with others is not touched.

    Raises:
        UserError: the output holds something else.
    """

    def __init__(self, output: Path, source: Path, settings: dict[str, Any]) -> None:
        if output.exists() and source.exists() and output.samefile(source):
            raise UserError(f"output: {output} is the input; name another file")
        self._output, self._run = output, output.with_name(output.name + RUN_SUFFIX)
        digest = hashlib.sha256(read_bytes(source)).hexdigest()
        self._settings = {"input": str(source), "input_sha256": digest, **settings}
        self.summary: dict[str, Any] | None = None
        """What `finish` was given, of a command that is finished already."""
        self.count = 0
        """Rows that are answered."""
        if output.exists():
            self._find_again()
        else:
            output.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the rows answered so far."""
        with self._output.open(encoding="utf-8") as file:
            yield from map(json.loads, file)

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add answers; they are on the disk when this returns."""
        lines = b"".join(map(encode_row, rows))
        if not self._output.exists():
            self._describe(None)
        with writing(self._output), self._output.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                if (written := file.write(lines)) < len(lines):
                    file.write(lines[written:])  # a disk that is full says so at the next write
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)  # no half of a row stays
                raise
        self.count += len(rows)

    def finish(self, summary: dict[str, Any]) -> None:
        """Keep the summary beside the answers."""
        self.summary = summary
        self._describe(summary)

    def _find_again(self) -> None:
        if not self._run.exists():
            raise UserError(
                f"output: {self._output} exists, and no {self._run.name} says what wrote it; "
                "remove it or name another file"
            )
        try:
            known = json.loads(self._run.read_text(encoding="utf-8"))
            settings, self.summary = known["settings"], known["summary"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self._run} is damaged; remove it and {self._output.name}") from None
        for key in sorted(settings.keys() | self._settings.keys()):
            before, now = settings.get(key), self._settings.get(key)
            if before != now and key != "input":
                what = f"another {key}" if key == "input_sha256" else f"{key} {before}, not {now}"
                raise UserError(f"output: {self._output} was begun with {what}; remove it or name another file")
        self._cut()

    def _cut(self) -> None:
        """Count the complete lines and cut off a last one that was not written to its end."""
        complete = 0
        with self._output.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    complete += len(line)
                    self.count += 1
        if complete < self._output.stat().st_size:
            os.truncate(self._output, complete)

    def _describe(self, summary: dict[str, Any] | None) -> None:
        text = json.dumps({"settings": self._settings, "summary": summary}, ensure_ascii=False, indent=2)
        draft = self._run.with_name(self._run.name + ".tmp")
        try:
            with writing(self._run):
                draft.write_text(text + "\n", encoding="utf-8")
                draft.replace(self._run)
        finally:
            draft.unlink(missing_ok=True)


class StreamedAnswers(Answers):
    """Answers that go to standard output or into a pipe: one after the other, nothing to go on with.

    Args:
        output: `STDOUT`, or a file that is a pipe or a device.
    """

    def __init__(self, output: Path) -> None:
        self._output, self._rows = output, list[dict[str, Any]]()
        self.summary, self.count = None, 0

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the rows answered so far."""
        yield from self._rows

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Write answers, and let them go at once."""
        lines = b"".join(map(encode_row, rows))
        if self._output == STDOUT:
            sys.stdout.buffer.write(lines)
            sys.stdout.buffer.flush()
        else:
            with self._output.open("wb") as file:
                file.write(lines)
        self._rows += rows
        self.count += len(rows)

    def finish(self, summary: dict[str, Any]) -> None:
        """Keep the summary."""
        self.summary = summary
