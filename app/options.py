"""What several commands share: options, in the one spelling that the program knows, and text from and to a terminal.

A parameter that is a path says which: `app/command_line.py` looks at it before a command imports what takes seconds,
and long before an hour of work has no place to be written to.
"""

import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, TextIO

from modules.checkpoints import folder
from modules.errors import UserError

Dtype = Literal["auto", "fp32", "float32", "bf16", "bfloat16"]
"""Format of matrix products or weights, as we call it or as torch does; auto: what the checkpoint has."""
StateDtype = Literal["fp32", "float32", "fp16", "float16"]
"""Format of the Mamba states between tokens."""
Device = Literal["auto", "cpu", "cuda"]
"""Where to compute; auto: a GPU if there is one."""
URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:/")
"""How a URL begins, and what a path makes of one."""
UNITS = {"": 1} | {
    prefix + suffix: base ** (power + 1)
    for suffix, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT")
}
STDIN, STDOUT = Path("/dev/stdin"), Path("/dev/stdout")
_CONTROL = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def _check_model(path: Path) -> Path:
    folder.check_model(path)
    return path


def _check_input(path: Path) -> Path:
    if str(path) == "-":
        return STDIN
    if path.is_dir():
        raise UserError(f"{path} is a folder, and a file is needed")
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path} cannot be read: no permission")
    return path


def _check_input_folder(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"{path} " + ("is a file, and a folder is needed" if path.exists() else "does not exist"))
    return path


def _check_output(path: Path) -> Path:
    if str(path) == "-":
        return STDOUT
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it")
    _check_writable(path)
    return path


def _check_new_folder(path: Path) -> Path:
    folder.check_new(path)
    _check_writable(path)
    return path


def _check_writable(path: Path) -> None:
    """Check that a path can be made, with the folders above it that are missing."""
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise UserError(f"{path}: {parent} is no folder; name another place")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{path} cannot be written: no permission in {parent}; name another place")


Model = Annotated[Path, _check_model]
"""A folder that fit wrote (checkpoint or run) or a Hugging Face folder."""
InputFile = Annotated[Path, _check_input]
"""A file that is there; - is standard input."""
InputFolder = Annotated[Path, _check_input_folder]
"""A folder that is there."""
OutputFile = Annotated[Path, _check_output]
"""A file to write; - is standard output."""
OutputFolder = Annotated[Path, _check_new_folder]
"""A folder that is not there yet, or empty."""


def for_people(output: Path | None) -> TextIO:
    """Return where a command prints what is no result: stderr if its results go to stdout."""
    return sys.stderr if output == STDOUT else sys.stdout


@cache
def _read_once(file: Path) -> bytes:
    return file.read_bytes()


def read_bytes(file: Path) -> bytes:
    """Return the content of a file; that of a pipe or of a terminal, which can be read once, again and again."""
    return file.read_bytes() if file.is_file() else _read_once(file)


def short_dtype(name: Dtype) -> Literal["auto", "fp32", "bf16"]:
    """Return our name of a dtype."""
    if name == "float32":
        return "fp32"
    return "bf16" if name == "bfloat16" else name


def short_state_dtype(name: StateDtype) -> Literal["fp32", "fp16"]:
    """Return our name of a state's dtype."""
    return "fp16" if name in ("fp16", "float16") else "fp32"


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 5GB, 500MB, 2GiB or 1000000; case and blanks do not count.

    Raises:
        UserError: it is no size, or none above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B)?", text.strip(), re.IGNORECASE)
    units = {name.upper(): factor for name, factor in UNITS.items()} | {"B": 1}
    size = int(float(match[1]) * units[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise UserError(f"--max_shard_size: {text!r} is no size; give one like 5GB, 500MB or 2GiB")
    return size


def check_local(path: str, key: str) -> None:
    """Check that a path is one of this machine.

    Raises:
        UserError: it is a URL, which would become a folder called `s3:`.
    """
    if URL.match(path):
        url = re.sub(":/+", "://", path, count=1)  # a Path has one slash
        raise UserError(f"{key}: {url} is a URL; give a path of this machine (copy what lies elsewhere here first)")


def read_text(text: str) -> str:
    """Return a text of the command line or of stdin with U+FFFD for each byte that is not UTF-8."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def printable(text: str) -> str:
    """Return a text for stdout; on a terminal control characters show as U+FFFD and steer nothing."""
    return text.translate(_CONTROL) if sys.stdout.isatty() else text


def write_text(text: str, dimmed: bool = False) -> None:
    """Write a piece of text to stdout at once, see `printable`; `dimmed` is for terminals with colours only."""
    shown = printable(text)
    print(f"\x1b[2m{shown}\x1b[0m" if dimmed and shown else shown, end="", flush=True)
