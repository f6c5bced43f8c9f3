"""Reading units of text: from bytes to documents, under the policies for bad input."""

import json
from codecs import BOM_UTF8
from collections.abc import Iterator

from datamodules.text.plain import parse_row
from datamodules.text.policies import Document, Policies, Tally
from datamodules.text.tables import CorruptTableError, read_records, read_rows
from datamodules.text.units import Unit, cut_tail, tail_size

_CELLS = ("code", "markdown", "heading")
"""Cells of a notebook that hold prose or code; the others (`raw`) are for converters."""


def read_unit(unit: Unit, policies: Policies, tally: Tally) -> Iterator[Document]:
    """Yield the documents of a unit in order.

    Args:
        unit: what to read.
        policies: what to do with bad input.
        tally: takes what is skipped and changed.

    Raises:
        UserError: for bad input whose policy is `strict`.
    """
    try:
        if unit.kind == "jsonl":
            yield from _read_lines(unit, policies, tally)
        elif unit.kind in ("parquet", "arrow"):
            yield from _read_table(unit, policies, tally)
        else:
            with open(unit.path, "rb") as file:
                file.seek(unit.start)
                data = file.read(unit.end - unit.start)
            text = policies.decode(data if unit.start else data.removeprefix(BOM_UTF8), unit.name, tally, file=True)
            if text is None:
                return
            if unit.kind == "notebook":
                yield from _read_notebook(text, unit.name, policies, tally)
            else:
                yield from _checked(unit.name, text, unit.last, policies, tally)
    except OSError as error:
        policies.unreadable(unit.name, error, tally)


def _read_notebook(content: str, name: str, policies: Policies, tally: Tally) -> Iterator[Document]:
    """Yield the text of a Jupyter notebook: the sources of its cells of prose and code, without their output."""
    try:
        notebook = json.loads(content)
        parts = notebook.get("worksheets", [notebook])  # where format 3 has the cells
        cells = [cell for part in parts for cell in part["cells"] if cell["cell_type"] in _CELLS]
        sources = ["".join(cell["input" if "input" in cell else "source"]) for cell in cells]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return policies.no_text(name, "no Jupyter notebook", len(content.encode()), tally)
    text = "\n\n".join(source.strip("\n") for source in sources if source.strip())
    # JSON can spell half a surrogate pair, which no UTF-8 can hold
    whole = policies.decode(f"{text}\n".encode("utf-8", "surrogatepass"), name, tally)
    if whole is not None:
        yield from _split(name, whole, policies, tally)


def _read_lines(unit: Unit, policies: Policies, tally: Tally) -> Iterator[Document]:
    with open(unit.path, "rb") as file:
        number = unit.line
        if unit.start:  # the line that runs over the start belongs to the unit before
            file.seek(unit.start - 1)
            number += file.readline() != b"\n"
        position = file.tell()
        if position == 0 and file.peek(3).startswith(BOM_UTF8):
            position = file.seek(3)
        while position < unit.end and (line := file.readline()):
            yield from _read_line(line, f"{unit.name}:{number}", policies, tally)
            position += len(line)
            number += 1


def _read_line(line: bytes, name: str, policies: Policies, tally: Tally) -> Iterator[Document]:
    if not line.strip():
        return
    decoded = policies.decode(line, name, tally)
    if decoded is None:
        return
    try:
        record = parse_row(decoded)
    except ValueError as error:
        return policies.no_text(name, str(error), len(line), tally)
    assert record is not None, "the line is not blank"
    text = policies.text_of(record, name, len(line), tally)
    if text is not None:
        yield from _split(name, text, policies, tally)


def _read_table(unit: Unit, policies: Policies, tally: Tally) -> Iterator[Document]:
    row = unit.start
    rows = read_rows(unit, policies.text_key) if policies.kind == "text" else read_records(unit)
    try:
        for data in rows:
            name = f"{unit.name} row {row}"
            row += 1
            if data is None:
                policies.no_text(name, f"null in the column '{policies.text_key}'", 0, tally)
                continue
            is_record = isinstance(data, dict)
            text = policies.text_of(data, name, 0, tally) if is_record else policies.decode(data, name, tally)
            if text is not None:
                yield from _split(name, text, policies, tally)
    except CorruptTableError as error:
        policies.corrupt(f"{unit.name} rows {row} to {unit.end - 1}", str(error), unit.end - row, tally)


def _split(name: str, text: str, policies: Policies, tally: Tally) -> Iterator[Document]:
    data = text.encode()
    limit = policies.max_document_bytes
    position = 0
    if len(data) > limit:
        if not policies.keeps_oversized(name, len(data), tally):
            return
        while len(data) - position > limit:
            near = position + limit - tail_size(limit)
            cut = near + cut_tail(data[near : position + limit + 1])
            yield from _checked(name, data[position:cut].decode(), False, policies, tally)
            position = cut
    yield from _checked(name, data[position:].decode(), True, policies, tally)


def _checked(name: str, text: str, ends: bool, policies: Policies, tally: Tally) -> Iterator[Document]:
    if text.strip():
        yield Document(name=name, text=text, ends=ends)
    else:
        policies.skip_empty(name, len(text.encode()), tally)
