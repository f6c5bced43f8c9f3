"""Rows of Parquet and Arrow files, a stretch at a time.

A Parquet file is read by its row groups, an Arrow file (what Hugging Face `datasets` keeps) is mapped into memory; of
texts only their column is touched. Texts come as bytes, because neither format promises that a string column is
UTF-8: what to do with a bad one is decided by the policies. pyarrow is imported where it is needed: it takes a quarter
of a second, and worker processes that read plain text do without.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from datamodules.text.policies import Policies, Tally
from datamodules.text.units import Unit, cut_rows
from modules.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

PARQUET_SUFFIXES = frozenset({".parquet", ".pq"})

_BATCH_BYTES = 1 << 20
_MOST_BATCH_ROWS = 4096


class CorruptTableError(Exception):
    """A table, or a stretch of it, that pyarrow cannot decode."""


def table_units(
    path: str, name: str, kind: Literal["parquet", "arrow"], policies: Policies, tally: Tally
) -> Iterator[Unit]:
    """Yield the units of a table.

    Args:
        path: the file.
        name: how messages call it.
        kind: its format.
        policies: name the text column and say what to do with a corrupt file.
        tally: takes a file that is corrupt or without rows.

    Raises:
        UserError: if the text column is missing or holds no text.
        OSError: if the system does not let us read the file.
    """
    try:
        groups = list(_groups(path, name, kind, policies.text_key if policies.kind == "text" else None))
    except CorruptTableError as error:
        return policies.corrupt(name, str(error), 1, tally)
    if not sum(rows for rows, _ in groups):
        return policies.skip_empty(name, 0, tally)
    for start, end, size in cut_rows(groups):
        yield Unit(path=path, name=name, kind=kind, start=start, end=end, size=size)


def column_names(path: str, suffix: str) -> list[str]:
    """Return the names of the columns of a table.

    Raises:
        CorruptTableError: if it cannot be decoded.
        OSError: if the system does not let us read the file.
    """
    with _decoding():
        if suffix in PARQUET_SUFFIXES:
            return _open_parquet(path, _state(path)).schema_arrow.names
        return _open_arrow(path, _state(path)).column_names


def read_rows(unit: Unit, column: str) -> Iterator[bytes | None]:
    """Yield the text of each row of a unit; None where there is none.

    Args:
        unit: rows of a table.
        column: name of the text column.

    Raises:
        CorruptTableError: if rows cannot be decoded; those before have been yielded.
        OSError: if the system does not let us read the file.
    """
    import pyarrow as pa

    with _decoding():
        for batch in _batches(unit, [column]):
            texts = batch.column(batch.schema.get_field_index(column)).cast(pa.large_binary())
            texts.validate(full=True)
            yield from texts.to_pylist()


def read_records(unit: Unit) -> Iterator[dict[str, Any]]:
    """Yield the rows of a unit as objects, without what is null: a struct of a table has all keys of all rows.

    Raises:
        CorruptTableError: if rows cannot be decoded; those before have been yielded.
        OSError: if the system does not let us read the file.
    """
    with _decoding():
        for batch in _batches(unit, None):
            batch.validate(full=True)
            yield from map(_without_nulls, batch.to_pylist())


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _batches(unit: Unit, columns: list[str] | None) -> Iterator["pa.RecordBatch"]:
    """Yield the rows of a unit, some at a time; None: with all columns."""
    batch_rows = max(1, min(_MOST_BATCH_ROWS, (unit.end - unit.start) * _BATCH_BYTES // max(unit.size, 1)))
    found = _parquet_batches(unit, columns, batch_rows) if unit.kind == "parquet" else _arrow_batches(unit, columns)
    for batch in found:
        for first in range(0, len(batch), batch_rows):
            yield batch.slice(first, batch_rows)


def _groups(path: str, name: str, kind: str, column: str | None) -> Iterator[tuple[int, int]]:
    """Yield (rows, bytes of the text column, None: of all) of the groups in which a file stores its rows."""
    with _decoding():
        if kind == "arrow":
            table = _open_arrow(path, _state(path))
            if column is not None:
                _check_column(table.schema, name, column)
                table = table.select([column])
            yield from ((len(batch), batch.nbytes) for batch in table.to_batches())
            return
        file = _open_parquet(path, _state(path))
        if column is not None:
            _check_column(file.schema_arrow, name, column)
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            parts = [group.column(n) for n in range(group.num_columns)]
            yield (
                group.num_rows,
                sum(part.total_uncompressed_size for part in parts if column in (None, part.path_in_schema)),
            )


def _check_column(schema: "pa.Schema", name: str, column: str) -> None:
    import pyarrow as pa

    def holds_text(kind: "pa.DataType") -> bool:
        if pa.types.is_dictionary(kind):
            return holds_text(kind.value_type)
        checks = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
        return any(getattr(pa.types, f"is_{check}")(kind) for check in checks)

    found = [field for field in schema if field.name == column]
    if len(found) == 1 and holds_text(found[0].type):
        return
    problem = f"has no column '{column}'"
    if found:
        problem = f"has a column '{column}' of {found[0].type}, not of text" if len(found) == 1 else (
            f"has {len(found)} columns '{column}'"
        )  # fmt: skip
    others = ", ".join(field.name for field in schema if field.name != column and holds_text(field.type))
    mend = f"give one that holds text: {others}" if others else "none of its columns holds text"
    raise UserError(f"text_key: {name} {problem}; {mend}")


def _parquet_batches(unit: Unit, columns: list[str] | None, batch_rows: int) -> Iterator["pa.RecordBatch"]:
    file = _open_parquet(unit.path, _state(unit.path))
    first = 0
    for number in range(file.num_row_groups):
        end = first + file.metadata.row_group(number).num_rows
        if first < unit.end and end > unit.start:
            position = first
            for batch in file.iter_batches(batch_rows, row_groups=[number], columns=columns, use_threads=False):
                low, high = max(unit.start - position, 0), min(unit.end - position, len(batch))
                if low < high:
                    yield batch.slice(low, high - low)
                position += len(batch)
                if position >= unit.end:
                    break
        first = end


def _arrow_batches(unit: Unit, columns: list[str] | None) -> Iterator["pa.RecordBatch"]:
    table = _open_arrow(unit.path, _state(unit.path))
    rows = table if columns is None else table.select(columns)
    yield from rows.slice(unit.start, unit.end - unit.start).to_batches()


def _state(path: str) -> tuple[int, int]:
    """Return what changes when a file does, so that no open file is taken for a newer one."""
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=4)
def _open_parquet(path: str, state: tuple[int, int]) -> "ParquetFile":
    from pyarrow.parquet import ParquetFile

    # buffer_size streams a column in place of reading a row group's at once
    options: dict[str, Any] = {"pre_buffer": False, "buffer_size": 1 << 20, "arrow_extensions_enabled": False}
    return ParquetFile(path, memory_map=True, page_checksum_verification=True, **options)


@functools.lru_cache(maxsize=4)
def _open_arrow(path: str, state: tuple[int, int]) -> "pa.Table":
    import pyarrow as pa

    source = pa.memory_map(path)
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:  # the random-access format is the other one
        source.seek(0)
        return pa.ipc.open_file(source).read_all()


@contextmanager
def _decoding() -> Iterator[None]:
    """Turn what pyarrow raises for bad data into a CorruptTableError; errors of the system pass."""
    import pyarrow as pa

    try:
        yield
    except pa.ArrowException as error:
        raise CorruptTableError(str(error).partition("\n")[0]) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise CorruptTableError(str(error).partition("\n")[0]) from error
