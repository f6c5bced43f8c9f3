"""From paths to units of work: which files belong to a corpus, in a fixed order.

A unit is a whole small file, a stretch of a big text file, or a range of lines of a JSONL file, so that one big file is
also read by many processes and no process holds more than some megabytes. Nothing is left out silently: each path that
is passed over is counted with its reason.
"""

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from datamodules.policies import Policies, Tally

DEFAULT_CORPUS = "stdlib"
"""Name that stands for the Python standard library's sources."""

JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
_TEXT_SUFFIXES = """
    .txt .text .md .markdown .mdx .rst .adoc .org .tex .log .csv .tsv
    .py .pyi .pyx .c .h .cc .cpp .cxx .hh .hpp .hxx .cu .cuh .m .mm .rs .go .java .kt .kts .scala .swift .cs .fs .d .zig
    .js .jsx .mjs .ts .tsx .vue .html .htm .css .scss .php .rb .pl .pm .lua .r .jl .hs .ml .mli .ex .exs .erl .clj .el
    .lisp .scm .sh .bash .zsh .fish .ps1 .bat .sql .xml .json .yaml .yml .toml .ini .cfg .cmake .gradle .proto .v .sv
    .vhd .asm .s .f .f90 .nix .tf .ipynb
"""
TEXT_SUFFIXES = frozenset(_TEXT_SUFFIXES.split())

_JSONL_RANGE = 4 << 20
_STDLIB_LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A stretch of one file that is read at once."""

    path: str
    """The file."""
    name: str
    """How messages call it."""
    jsonl: bool
    """Whether it holds a JSON object a line; else the stretch is one document."""
    start: int
    """First byte. A JSONL unit owns the lines that start in [start, end)."""
    end: int
    """End in bytes, exclusive."""
    last: bool = True
    """Whether the document ends at `end` (false inside a split file)."""


def list_units(paths: list[str], policies: Policies, tally: Tally) -> list[Unit]:
    """List the units of files and folders; folders are walked in sorted order.

    Args:
        paths: files, folders, or the word `stdlib`.
        policies: what to do with oversized files.
        tally: takes what is passed over.

    Raises:
        ValueError: for a path that does not exist or a single file of unknown kind.
    """
    units: list[Unit] = []
    for path in paths:
        if path == DEFAULT_CORPUS:
            root = sysconfig.get_paths()["stdlib"]
            for name in _walk_standard_library(root):
                units.extend(_file_units(os.path.join(root, name), f"{DEFAULT_CORPUS}/{name}", policies, tally))
        elif os.path.isdir(path):
            for name in _walk(path, tally):
                file = os.path.join(path, name)
                units.extend(_file_units(file, file, policies, tally))
        elif os.path.isfile(path):
            if not _is_known(path):
                raise ValueError(
                    f"paths: {path} has the suffix '{Path(path).suffix}', which is neither text nor JSONL; "
                    "rename it (.txt, .md, .jsonl, ...) if it is"
                )
            units.extend(_file_units(path, path, policies, tally))
        else:
            raise ValueError(f"paths: {path} does not exist; give files, folders or the word '{DEFAULT_CORPUS}'")
    return units


def _is_known(path: str) -> bool:
    return Path(path).suffix.lower() in TEXT_SUFFIXES | JSONL_SUFFIXES


def _walk_standard_library(root: str) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _STDLIB_LEFT_OUT)
        for file in sorted(files):
            if file.endswith(".py"):
                yield os.path.relpath(os.path.join(folder, file), root)


def _walk(root: str, tally: Tally) -> Iterator[str]:
    def unreadable(error: OSError) -> None:
        tally.skip("unreadable folder", str(error.filename))

    for folder, folders, files in os.walk(root, onerror=unreadable):
        for name in sorted(folders):
            if name.startswith("."):
                tally.skip("hidden folder", os.path.join(folder, name))
            elif os.path.islink(os.path.join(folder, name)):
                tally.skip("linked folder", os.path.join(folder, name))
        folders[:] = sorted(n for n in folders if not n.startswith(".") and not os.path.islink(os.path.join(folder, n)))
        for name in sorted(files):
            file = os.path.join(folder, name)
            if name.startswith("."):
                tally.skip("hidden file", file)
            elif not _is_known(name):
                tally.skip("unsupported suffix", file)
            else:
                yield os.path.relpath(file, root)


def _file_units(path: str, name: str, policies: Policies, tally: Tally) -> Iterator[Unit]:
    try:
        size = os.path.getsize(path)
        if size == 0:
            policies.skip_empty(name, 0, tally)
        elif Path(path).suffix.lower() in JSONL_SUFFIXES:
            for start in range(0, size, _JSONL_RANGE):
                end = min(start + _JSONL_RANGE, size)
                yield Unit(path=path, name=name, jsonl=True, start=start, end=end)
        elif size <= policies.max_document_bytes:
            yield Unit(path=path, name=name, jsonl=False, start=0, end=size)
        elif policies.keeps_oversized(name, size, tally):
            cuts = [0, *_cuts(path, size, policies.max_document_bytes), size]
            for start, end in pairwise(cuts):
                yield Unit(path=path, name=name, jsonl=False, start=start, end=end, last=end == size)
    except OSError as error:
        policies.unreadable(name, error, tally)


def _cuts(path: str, size: int, limit: int) -> Iterator[int]:
    """Yield offsets that cut a file into stretches of at most `limit` bytes."""
    with open(path, "rb") as file:
        position = 0
        while size - position > limit:
            file.seek(position + limit - tail_size(limit))
            position += limit - tail_size(limit) + cut_tail(file.read(tail_size(limit) + 1))
            yield position


def tail_size(limit: int) -> int:
    """Return how many of the last of `limit` bytes a cut is looked for in."""
    return max(4, limit // 5)


def cut_tail(tail: bytes) -> int:
    """Return where to cut: after the last line end, else before a character (of mostly UTF-8).

    Args:
        tail: the bytes in which to cut and one more.
    """
    line = tail.rfind(b"\n", 0, len(tail) - 1)
    if line >= 0:
        return line + 1
    last = len(tail) - 1
    starts = [end for end in range(last, last - 4, -1) if tail[end] & 0xC0 != 0x80]  # not a continuation byte
    return starts[0] if starts else last
