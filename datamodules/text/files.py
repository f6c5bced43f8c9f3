"""Writing files so that each exists completely or not at all, however the process ends."""

import os
from collections.abc import Iterable
from pathlib import Path

from modules.errors import UserError

_PARTIAL = ".partial"


def is_remote(path: str) -> bool:
    """Return whether a path is one that LitData has to download."""
    return "://" in path or path.startswith("local:")


def write_file(path: Path, data: bytes) -> None:
    """Write a file under a temporary name beside it, bring it to the disk, and rename it.

    Raises:
        UserError: if the system refuses (full disk, no permission); the temporary file is removed.
    """
    write_blocks(path, [data])


def write_blocks(path: Path, blocks: Iterable[bytes]) -> None:
    """Do as `write_file` does with content that comes in blocks."""
    if path.is_symlink() or (path.exists() and not path.is_file()):  # /dev/stdout for one: nothing to be renamed over
        with open(path, "wb") as file:
            file.writelines(blocks)
        return
    partial = path.with_name(f"{path.name}{_PARTIAL}{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            for block in blocks:
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; mend that (free space?) and run the same command again, "
            "what is written so far is kept"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def remove_partial_files(folder: Path) -> None:
    """Remove what killed processes left behind under temporary names."""
    for partial in folder.rglob(f"*{_PARTIAL}*"):
        partial.unlink(missing_ok=True)
