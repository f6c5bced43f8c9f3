"""Files as plain UTF-8 text, whatever their encoding and compression, and the lines of JSONL: one reader for all.

UTF-16 and UTF-32 are known by their byte-order mark or, without one, by where their NULs stand; any other file with a
NUL near its beginning is binary (git's rule). Encodings without a mark of their own (Latin-1, CP1251, Shift-JIS, ...)
cannot be told apart for certain: what is not UTF-8 is left to the policies.
"""

import bz2
import codecs
import gzip
import json
import lzma
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from modules.errors import UserError

HEAD_BYTES = 8000
"""What is looked at to tell text from binary."""
UTF_8 = "utf-8"

_BLOCK = 1 << 20
_MARKS = {
    codecs.BOM_UTF8: UTF_8,
    codecs.BOM_UTF32_LE: "utf-32-le",  # begins with the mark of utf-16-le
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_NO_TEXT = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f\ufffd]")
_MOST_NO_TEXT = 0.3
"""Share of control characters and bad bytes above which something is no text in this encoding."""


class DamagedFileError(Exception):
    """A file that cannot be read, decompressed or decoded; says why."""


def _open_zstd(path: str | Path) -> IO[bytes]:
    import pyarrow as pa

    return pa.input_stream(str(path), compression="zstd")


COMPRESSIONS: dict[str, Callable[[str | Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
    ".zstd": _open_zstd,
}
"""Suffix -> what opens such a file."""


def compression_of(path: str | Path) -> str:
    """Return the suffix that says how a file is compressed, "" for none."""
    suffix = Path(path).suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def format_of(path: str | Path) -> str:
    """Return the suffix that says what is in a file, in lower case: `.jsonl` of `a.JSONL.gz`."""
    return Path(Path(path).stem if compression_of(path) else path).suffix.lower()


def read_blocks(path: str | Path) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file, the first block at least `HEAD_BYTES` long if there are so many.

    Raises:
        DamagedFileError: it cannot be read to its end.
    """
    try:
        with COMPRESSIONS.get(compression_of(path), lambda path: open(path, "rb"))(path) as file:
            while block := file.read(_BLOCK):
                yield block
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DamagedFileError(reason.splitlines()[0]) from error


def encoding_of(head: bytes) -> str | None:
    """Return the encoding of a text by its first `HEAD_BYTES` (fewer: all of it), None for a binary file.

    `utf-8` stands for all encodings of single bytes.
    """
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return name if is_text(head[len(mark) :].decode(name, "replace")) else None
    if b"\0" not in head:
        return UTF_8
    for name, width in (("utf-32-le", 4), ("utf-32-be", 4), ("utf-16-le", 2), ("utf-16-be", 2)):
        if len(head) % width == 0 and _is_certainly_text(head, name):
            return name
    return None


def is_text(text: str) -> bool:
    """Return whether what was decoded is text: not for the most part control characters and U+FFFD."""
    return len(_NO_TEXT.findall(text)) <= _MOST_NO_TEXT * len(text)


def _is_certainly_text(head: bytes, encoding: str) -> bool:
    try:  # the last character may be cut
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    return not _NO_TEXT.search(text) and not any(unicodedata.category(c) in ("Cn", "Co") for c in set(text))


def plain_blocks(blocks: Iterator[bytes], encoding: str, errors: str = "strict") -> Iterator[bytes]:
    """Yield the text of a file in UTF-8, without a byte-order mark.

    Args:
        blocks: its decompressed bytes.
        encoding: as `encoding_of` says; utf-8 goes through unchecked.
        errors: what to do with what cannot be decoded, as in `bytes.decode`.

    Raises:
        UnicodeDecodeError: something cannot be decoded.
    """
    mark = next(mark for mark, name in _MARKS.items() if name == encoding)
    first = next(blocks, b"").removeprefix(mark)
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    for block in chain([first], blocks):
        yield block if encoding == UTF_8 else decoder.decode(block).encode()
    if encoding != UTF_8:
        yield decoder.decode(b"", final=True).encode()


def read_plain(path: Path, content: bytes | None = None) -> bytes:
    """Return the text of a file in UTF-8, whatever its compression and encoding.

    Args:
        path: the file.
        content: its bytes where they have been read: of a pipe, which can be read once.

    Raises:
        UserError: it is binary or damaged; names it.
        OSError: it cannot be opened.
    """
    try:
        blocks = list(read_blocks(path)) if content is None else [content]
        encoding = encoding_of(b"".join(blocks[:1])[:HEAD_BYTES])
        if encoding is None:
            raise DamagedFileError("it is binary, not text")
        return b"".join(plain_blocks(iter(blocks), encoding))
    except (DamagedFileError, UnicodeDecodeError) as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno:  # what is missing is told as everywhere
            raise error.__cause__ from None
        raise UserError(f"{path} cannot be read ({error}); give a file of UTF-8 text") from None


def parse_row(line: bytes | str) -> dict[str, Any] | None:
    """Return the object in a line of a JSONL file; None for a blank line.

    Raises:
        ValueError: it holds none, in a few words; the cause says more.
    """
    if not line.strip():
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON") from error
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row
