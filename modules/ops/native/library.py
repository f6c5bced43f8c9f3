"""Compiles a C file, which may include this folder's headers, once for this processor, into the user's cache."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

HEADERS = Path(__file__).parent
LINK = ("-shared", "-fopenmp")
"""Linked without -ffast-math, which would set the whole process to flush subnormal numbers to zero."""


def load_library(source: Path, flags: tuple[str, ...]) -> tuple[ctypes.CDLL | None, str]:
    """Return (the library or None, "active" or the reason there is none).

    Args:
        source: a C file.
        flags: of the compiler.
    """
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None, "no C compiler"
    try:
        return ctypes.CDLL(str(_compiled(compiler, source, flags))), "active"
    except (OSError, subprocess.CalledProcessError) as error:
        output = error.stderr.strip().splitlines() if isinstance(error, subprocess.CalledProcessError) else [str(error)]
        return None, f"{Path(compiler).name} failed: {output[0] if output else 'without a message'}"


def _compiled(compiler: str, source: Path, flags: tuple[str, ...]) -> Path:
    """Return the library's file, from the user's cache or compiled into it (a few seconds)."""
    flags = (*flags, "-march=native", "-fopenmp", "-fPIC", "-c")
    key = hashlib.sha256(source.read_bytes())
    for header in sorted(HEADERS.glob("*.h")):
        key.update(header.read_bytes())
    key.update(repr((compiler, flags, LINK, platform.machine(), _processor())).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "superbolt"
    target = cache / f"{source.stem}-{key.hexdigest()[:16]}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # renamed when complete: others may compile it too
            code, library = Path(folder) / "code.o", Path(folder) / "library.so"
            for command in (
                [compiler, *flags, f"-I{HEADERS}", str(source), "-o", str(code)],
                [compiler, *LINK, str(code), "-o", str(library), "-lm"],
            ):
                subprocess.run(command, check=True, capture_output=True, text=True)
            library.replace(target)
    return target


def _processor() -> str:
    """Return what this processor can do, as far as the system tells: a library for another one would crash."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
