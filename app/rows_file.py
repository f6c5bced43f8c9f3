"""JSONL files that a command reads row by row and answers row by row, going on where it stopped.

Answers are appended in the order of the input, so the number of complete lines says how far a command came. Beside
OUTPUT lies OUTPUT.run.json: what was asked, with a digest of the input, and in the end the summary. By it the same
command knows its own work again, and a different one does not add to it.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modules.errors import UserError, writing

RUN_SUFFIX = ".run.json"


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read a JSONL file of objects.

    Raises:
        UserError: a line is no JSON object (the line's number is named), or there is none.
    """
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            raise UserError(f"{file}:{number}: the line is empty; remove it")
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}:{number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{file}:{number}: a row must be a JSON object, like {{...}}")
        try:
            encode_row(row)
        except ValueError:
            what = "NaN, an infinite number or half of a surrogate pair, which the output cannot hold"
            raise UserError(f"{file}:{number}: a value is {what}; remove it") from None
        rows.append(row)
    if not rows:
        raise UserError(f"{file}: the file has no rows")
    return rows


def encode_row(row: dict[str, Any]) -> bytes:
    """Return a row as a line of a file.

    Raises:
        UserError: it holds a number that is not finite, or half a surrogate pair.
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
    except UnicodeEncodeError:
        raise UserError(f"{where}: {key} holds half a surrogate pair, which is no text") from None
    return text


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
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        self._settings = {"input": str(source), "input_sha256": digest, **settings}
        self.summary: dict[str, Any] | None = None
        """What `finish` was given, of a command that is finished already."""
        self.count = 0
        """Rows that are answered."""
        if output.exists():
            self._find_again()
        else:
            output.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(output.parent, os.W_OK):
                raise UserError(f"output: {output.parent} cannot be written; name a file in another folder")

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
