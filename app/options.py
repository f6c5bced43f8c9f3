"""What several commands share: options, in the one spelling that the program knows, and text from and to a terminal."""

import re
import sys
from typing import Literal

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
_CONTROL = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


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
        raise UserError(f"{key}: {path} is a URL; give a path of this machine (copy what lies elsewhere here first)")


def read_text(text: str) -> str:
    """Return a text of the command line or of stdin with U+FFFD for each byte that is not UTF-8."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def write_text(text: str) -> None:
    """Write a piece of text to stdout at once; on a terminal control characters show as U+FFFD and steer nothing."""
    print(text.translate(_CONTROL) if sys.stdout.isatty() else text, end="", flush=True)
