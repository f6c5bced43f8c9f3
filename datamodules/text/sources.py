"""From paths to units of work: which files belong to a corpus, in a fixed order.

A unit is a whole small file, a stretch of a big text file, a range of lines of a JSONL file or of rows of a table, so
that one big file is also read by many processes and no process holds more than some megabytes. Nothing is left out
silently: each path that is passed over is counted with its reason.
"""

import os
import sysconfig
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

from datamodules.text import hub, remote
from datamodules.text.policies import Policies, Tally
from datamodules.text.tables import PARQUET_SUFFIXES, table_units
from datamodules.text.units import Unit, cut_tail, tail_size
from modules.errors import UserError

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


def list_units(paths: list[str], policies: Policies, tally: Tally, downloads: Path) -> list[Unit]:
    """List the units of files, folders, URLs and datasets; folders are walked in sorted order.

    Args:
        paths: files, folders, URLs, `hf:` names, or the word `stdlib`.
        policies: what to do with oversized and corrupt files; the text column of tables.
        tally: takes what is passed over.
        downloads: folder that keeps what URLs hold.

    Raises:
        UserError: for a path that does not exist, a single file of unknown kind, a table without the text column.
    """
    units: list[Unit] = []
    for path in paths:
        for file, name in _files(path, tally, downloads):
            units.extend(_file_units(file, name, policies, tally))
    return units


def _files(path: str, tally: Tally, downloads: Path) -> Iterator[tuple[str, str]]:
    """Yield (file, how messages call it) of what a path stands for."""
    if path == DEFAULT_CORPUS:
        root = sysconfig.get_paths()["stdlib"]
        for name in _walk_standard_library(root):
            yield os.path.join(root, name), f"{DEFAULT_CORPUS}/{name}"
    elif os.path.isdir(path):
        for name in _walk(path, path, tally):
            file = os.path.join(path, name)
            yield file, file
    elif os.path.isfile(path):
        _check_known(path, path)
        yield path, path
    elif path.startswith(hub.SCHEME):
        for file in hub.load_files(path):
            yield file, f"{path} {os.path.basename(file)}"
    elif remote.is_url(path):
        yield from _remote_files(path, tally, downloads)
    else:
        raise UserError(
            f"paths: {path} does not exist; give files, folders, URLs, {hub.SYNTAX} or the word '{DEFAULT_CORPUS}'"
        )


def _remote_files(url: str, tally: Tally, downloads: Path) -> Iterator[tuple[str, str]]:
    remote.check_scheme(url, "paths", (*remote.STORE_SCHEMES, *remote.WEB_SCHEMES))
    name = remote.public(url)
    address = urlsplit(url)
    single = _is_known(address.path)
    if address.scheme in remote.WEB_SCHEMES:
        _check_known(name, address.path)
    files = remote.list_files(url, single)
    if single:
        folder = remote.download(url, files, single, downloads)
        yield str(folder / files[0].name), name
        return
    name = name.rstrip("/")
    wanted = [file for file in files if _is_wanted(file.name, f"{name}/{file.name}", tally)]
    root = str(remote.download(url, wanted, single, downloads))
    for inside in _walk(root, name, tally):
        yield os.path.join(root, inside), f"{name}/{inside}"


def _is_wanted(name: str, shown: str, tally: Tally) -> bool:
    """Return whether a file in a "folder" of an object store is worth a download."""
    if any(part.startswith(".") for part in name.split("/")):
        tally.skip("hidden file", shown)
    elif not _is_known(name) and not name.endswith(hub.DATA_SUFFIX):
        tally.skip("unsupported suffix", shown)
    else:
        return True
    return False


def _is_known(path: str) -> bool:
    return Path(path).suffix.lower() in TEXT_SUFFIXES | JSONL_SUFFIXES | PARQUET_SUFFIXES


def _check_known(shown: str, path: str) -> None:
    if not _is_known(path):
        raise UserError(
            f"paths: {shown} has the suffix '{Path(path).suffix}', which is neither text nor JSONL nor Parquet; "
            "rename it (.txt, .md, .jsonl, .parquet, ...) if it is"
        )


def _walk_standard_library(root: str) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _STDLIB_LEFT_OUT)
        for file in sorted(files):
            if file.endswith(".py"):
                yield os.path.relpath(os.path.join(folder, file), root)


def _walk(root: str, shown: str, tally: Tally) -> Iterator[str]:
    """Yield the paths below a folder of the files to read, sorted folder by folder; messages call it `shown`."""

    def unreadable(error: OSError) -> None:
        tally.skip("unreadable folder", os.path.join(shown, os.path.relpath(str(error.filename), root)))

    for folder, folders, files in os.walk(root, onerror=unreadable):
        inside = os.path.relpath(folder, root)
        place = "" if inside == "." else inside

        def skip(reason: str, name: str, place: str = place) -> None:
            tally.skip(reason, os.path.join(shown, place, name))

        if (data := hub.saved_files(folder, files, skip)) is not None:
            folders.clear()
            yield from (os.path.join(place, name) for name in data)
            continue
        if (split := hub.saved_split(folder, files, skip)) is not None:
            folders[:] = [split]
            continue
        for name in sorted(folders):
            if name.startswith("."):
                skip("hidden folder", name)
            elif os.path.islink(os.path.join(folder, name)):
                skip("linked folder", name)
        folders[:] = sorted(n for n in folders if not n.startswith(".") and not os.path.islink(os.path.join(folder, n)))
        for name in sorted(files):
            if name.startswith("."):
                skip("hidden file", name)
            elif not _is_known(name):
                skip("unsupported suffix", name)
            else:
                yield os.path.join(place, name)


def _file_units(path: str, name: str, policies: Policies, tally: Tally) -> Iterator[Unit]:
    suffix = Path(path).suffix.lower()
    try:
        size = os.path.getsize(path)
        if size == 0:
            policies.skip_empty(name, 0, tally)
        elif suffix in PARQUET_SUFFIXES:
            yield from table_units(path, name, "parquet", policies, tally)
        elif suffix == hub.DATA_SUFFIX:
            yield from table_units(path, name, "arrow", policies, tally)
        elif suffix in JSONL_SUFFIXES:
            for start in range(0, size, _JSONL_RANGE):
                end = min(start + _JSONL_RANGE, size)
                yield Unit(path=path, name=name, kind="jsonl", start=start, end=end, size=end - start)
        elif size <= policies.max_document_bytes:
            yield Unit(path=path, name=name, kind="text", start=0, end=size, size=size)
        elif policies.keeps_oversized(name, size, tally):
            cuts = [0, *_cuts(path, size, policies.max_document_bytes), size]
            for start, end in pairwise(cuts):
                last = end == size
                yield Unit(path=path, name=name, kind="text", start=start, end=end, size=end - start, last=last)
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
