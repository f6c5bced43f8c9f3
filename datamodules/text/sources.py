"""From paths to units of work: which files belong to a corpus, in a fixed order.

A unit is a whole small file, a stretch of a big text file, a range of lines of a JSONL file or of rows of a table, so
that one big file is also read by many processes and no process holds more than some megabytes. What is compressed, or
in UTF-16 or UTF-32, is first copied as plain UTF-8, so that it can be cut and read in parallel like any other file.
Nothing is left out silently: each path that is passed over is counted with its reason.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from datamodules.progress import ProgressBar
from datamodules.text import hub, remote
from datamodules.text.files import write_blocks
from datamodules.text.plain import (
    HEAD_BYTES,
    UTF_8,
    DamagedFileError,
    compression_of,
    encoding_of,
    format_of,
    parse_row,
    plain_blocks,
    read_blocks,
)
from datamodules.text.policies import Policies, Tally
from datamodules.text.tables import PARQUET_SUFFIXES, CorruptTableError, column_names, table_units
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
    .vhd .asm .s .f .f90 .nix .tf
"""
TEXT_SUFFIXES = frozenset(_TEXT_SUFFIXES.split())
NOTEBOOK_SUFFIX = ".ipynb"
_KNOWN = TEXT_SUFFIXES | JSONL_SUFFIXES | PARQUET_SUFFIXES | {NOTEBOOK_SUFFIX}
_ARCHIVES = frozenset(".zip .tar .tgz .tbz .tbz2 .txz .7z .rar .jar .whl .egg .deb .rpm .iso".split())
_OTHER_COMPRESSIONS = frozenset(".lz4 .lzma .lz .lzo .z .br .snappy .sz".split())

_JSONL_RANGE = 4 << 20
_LOOKED_AT_ONCE = 256
_STDLIB_LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


def list_units(paths: list[str], policies: Policies, tally: Tally, downloads: Path) -> list[Unit]:
    """List the units of files, folders, URLs and datasets; folders are walked in sorted order.

    Args:
        paths: files, folders, URLs, `hf:` names, or the word `stdlib`.
        policies: what to do with oversized and corrupt files; the text column of tables.
        tally: takes what is passed over.
        downloads: folder that keeps what URLs hold, and plain copies.

    Raises:
        UserError: for a path that does not exist, a single file of unknown kind, a table without the text column.
    """
    files = [SourceFile(*file) for path in paths for file in _files(path, tally, downloads)]
    plain = _plain_files(files, policies, tally, downloads / "plain")
    return [unit for file in plain for unit in _file_units(file.path, file.name, policies, tally)]


def first_row(paths: list[str], downloads: Path) -> dict[str, Any] | None:
    """Return the first row of sources that are tables or JSONL files and nothing else; of a table "" for each value.

    None: there are other files, or URLs among them, or no row.

    Args:
        paths: as `list_units` takes them.
        downloads: as `list_units` takes it.
    """
    if any(remote.is_url(path) and not os.path.exists(path) for path in paths):
        return None
    found: dict[str, Any] | None = None
    for file, _ in chain.from_iterable(_files(path, Tally(), downloads) for path in paths):
        kind = format_of(file)
        if kind not in JSONL_SUFFIXES | PARQUET_SUFFIXES | {hub.DATA_SUFFIX}:
            return None
        try:
            found = found or (
                _first_line(file) if kind in JSONL_SUFFIXES else dict.fromkeys(column_names(file, kind), "")
            )
        except (OSError, DamagedFileError, CorruptTableError):  # told when it is read
            continue
    return found


def _first_line(file: str) -> dict[str, Any] | None:
    """Return the first object among the lines at the beginning of a file."""
    blocks = read_blocks(file)
    first = next(blocks, b"")
    for block in blocks:
        if b"\n" in first:
            break
        first += block
    encoding = encoding_of(first[:HEAD_BYTES])
    for line in first.decode(encoding or UTF_8, "replace").splitlines():
        try:
            if row := parse_row(line.removeprefix("\ufeff")):
                return row
        except ValueError:
            continue
    return None


class SourceFile(NamedTuple):
    """A file to read."""

    path: str
    name: str
    """How messages call it."""


def survey(paths: list[str], downloads: Path) -> dict[str, list[int | str]]:
    """Return what tells a change of the sources without reading them: name -> [bytes, time or version].

    Args:
        paths: as `list_units` takes them; of URLs only the names are listed.
        downloads: as `list_units` takes it.

    Raises:
        UserError: for a path that does not exist.
    """
    found: dict[str, list[int | str]] = {}
    for path in paths:
        if remote.is_url(path) and not os.path.exists(path):
            name = remote.public(path).rstrip("/")
            single = _is_known(urlsplit(path).path)
            for file in remote.list_files(path, single):
                if single or _is_wanted(file.name, file.name, file.size, Tally()):
                    found[name if single else f"{name}/{file.name}"] = [file.size, file.version]
            continue
        for file, name in _files(path, Tally(), downloads):
            try:
                status = os.stat(file)
            except OSError:  # counted as unreadable when it is read
                continue
            found[name] = [status.st_size, status.st_mtime_ns]
    return found


def _files(path: str, tally: Tally, downloads: Path) -> Iterator[tuple[str, str]]:
    """Yield (file, how messages call it) of what a path stands for."""
    if path == DEFAULT_CORPUS:
        root = sysconfig.get_paths()["stdlib"]
        for name in _walk_standard_library(root):
            yield os.path.join(root, name), f"{DEFAULT_CORPUS}/{name}"
    elif os.path.isdir(path):
        for name in _walk(path, path, tally, downloads.parent.parent):
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
    wanted = [file for file in files if _is_wanted(file.name, f"{name}/{file.name}", file.size, tally)]
    root = str(remote.download(url, wanted, single, downloads))
    for inside in _walk(root, name, tally):
        yield os.path.join(root, inside), f"{name}/{inside}"


def _is_wanted(name: str, shown: str, size: int, tally: Tally) -> bool:
    """Return whether a file in a "folder" of an object store is worth a download."""
    if any(part.startswith(".") for part in name.split("/")):
        tally.skip("hidden file", shown, size)
    elif not _is_known(name) and not name.endswith(hub.DATA_SUFFIX):
        tally.skip(_unknown(name), shown, size)
    else:
        return True
    return False


def _is_known(path: str) -> bool:
    return format_of(path) in _KNOWN


def _unknown(path: str) -> str:
    """Return why a file that is not known by its name is not read, and what to do."""
    suffix = Path(path).suffix.lower()
    if suffix in _ARCHIVES or format_of(path) in _ARCHIVES:
        return "archive: unpack it and give the folder"
    if suffix in _OTHER_COMPRESSIONS:
        return "compressed in a way that is not read: unpack it, or compress it as .gz or .zst"
    if compression_of(path):
        return f"compressed, but its name says not what: rename it (.txt{suffix}, .jsonl{suffix}, ...)"
    return "unsupported suffix"


def _check_known(shown: str, path: str) -> None:
    if _is_known(path):
        return
    if (reason := _unknown(path)) != "unsupported suffix":
        raise UserError(f"paths: {shown} is {'an ' if reason.startswith('archive') else ''}{reason}")
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


def _walk(root: str, shown: str, tally: Tally, corpus: Path | None = None) -> Iterator[str]:
    """Yield the paths below a folder of the files to read, sorted folder by folder; messages call it `shown`.

    The corpus that is being prepared may lie below it, and is none of its own sources.
    """

    def unreadable(error: OSError) -> None:
        tally.skip("unreadable folder", os.path.join(shown, os.path.relpath(str(error.filename), root)))

    for folder, folders, files in os.walk(root, onerror=unreadable):
        inside = os.path.relpath(folder, root)
        place = "" if inside == "." else inside

        def skip(reason: str, name: str, place: str = place) -> None:
            path = os.path.join(root, place, name)
            size = os.path.getsize(path) if os.path.isfile(path) else 0
            tally.skip(reason, os.path.join(shown, place, name), size)

        if (data := hub.saved_files(folder, files, skip)) is not None:
            folders.clear()
            yield from (os.path.join(place, name) for name in data)
            continue
        if (split := hub.saved_split(folder, files, skip)) is not None:
            folders[:] = [split]
            continue
        inner: list[str] = []
        for name in sorted(folders):
            if name.startswith("."):
                skip("hidden folder", name)
            elif os.path.islink(os.path.join(folder, name)):
                skip("linked folder", name)
            elif corpus is None or Path(folder, name).absolute() != corpus.absolute():
                inner.append(name)
        folders[:] = inner
        for name in sorted(files):
            if name.startswith("."):
                skip("hidden file", name)
            elif not _is_known(name):
                skip(_unknown(name), name)
            else:
                yield os.path.join(place, name)


def _plain_files(files: list[SourceFile], policies: Policies, tally: Tally, copies: Path) -> Iterator[SourceFile]:
    """Yield the files with plain copies in place of those that are compressed or in UTF-16 or UTF-32, binary ones out.

    Args:
        files: what was found.
        policies: what to do with binary and damaged files.
        tally: takes what is left out or decoded.
        copies: folder of the copies; what is there already is taken.
    """
    size = sum(os.path.getsize(file.path) for file in files if compression_of(file.path) and os.path.isfile(file.path))
    with ProgressBar("decompressing", size) as progress, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:

        def look(file: SourceFile) -> _Plain:
            found = _make_plain(file, policies, copies)
            if compression_of(file.path):
                progress.advance(found.size)
            return found

        todo = iter(files)
        while batch := list(islice(todo, _LOOKED_AT_ONCE)):
            for file, found in zip(batch, pool.map(look, batch), strict=True):
                if found.problem is not None:
                    policies.corrupt(file.name, found.problem, 1, tally)
                elif found.encoding is None:
                    policies.binary(file.name, found.size, tally)
                else:
                    if found.encoding != UTF_8:
                        tally.change(f"decoded from {found.encoding.upper()}", file.name, found.size)
                    yield SourceFile(found.path, file.name)


class _Plain(NamedTuple):
    """What became of a file."""

    path: str
    """Itself, or its plain copy."""
    size: int
    """Bytes of the file."""
    encoding: str | None = UTF_8
    """Of the file; None: binary."""
    problem: str | None = None
    """Why it cannot be decoded."""


def _make_plain(file: SourceFile, policies: Policies, copies: Path) -> _Plain:
    """Return a file that can be read as it is, or its copy in plain UTF-8, which is made where it is not there."""
    compression, kind = compression_of(file.path), format_of(file.path)
    tables = kind in PARQUET_SUFFIXES | {hub.DATA_SUFFIX}
    try:
        status = os.stat(file.path)
        if tables and not compression:
            return _Plain(file.path, status.st_size)
        blocks = read_blocks(file.path)
        first = next(blocks, b"")
    except (OSError, DamagedFileError) as error:
        # a plain file that the system does not let us read is counted where it is read
        return _Plain(file.path, 0, problem=str(error) if compression else None)
    encoding = UTF_8 if tables else encoding_of(first[:HEAD_BYTES])
    if encoding is None or (encoding == UTF_8 and not compression):
        return _Plain(file.path, status.st_size, encoding)
    described = f"{file.name} {status.st_size} {status.st_mtime_ns}"
    target = copies / (hashlib.sha256(described.encode()).hexdigest()[:16] + kind)
    try:
        if not target.is_file():
            write_blocks(target, plain_blocks(chain([first], blocks), encoding))
    except (DamagedFileError, UnicodeDecodeError) as error:
        return _Plain(file.path, status.st_size, encoding, problem=str(error))
    return _Plain(str(target), status.st_size, encoding)


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
            line = 1
            with open(path, "rb") as file:
                for start in range(0, size, _JSONL_RANGE):
                    end = min(start + _JSONL_RANGE, size)
                    yield Unit(path=path, name=name, kind="jsonl", start=start, end=end, size=end - start, line=line)
                    line += file.read(_JSONL_RANGE).count(b"\n")
        elif policies.kind != "text":
            tally.skip("no conversations: neither JSONL nor Parquet nor a dataset", name, size)
        elif suffix == NOTEBOOK_SUFFIX:
            yield Unit(path=path, name=name, kind="notebook", start=0, end=size, size=size)
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
