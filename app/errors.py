"""How a user's mistake is told from a defect of ours, and in how many words it is answered.

A mistake (a `UserError`, a file that is not there, a full disk) costs one to three lines and exit code 2; everything
else keeps its traceback and exits with 1, because somebody will have to read it.
"""

import re

from app.run_keys import stages
from app.signatures import parameters
from modules.errors import UserError, full_disk

NOT_A_MISTAKE = (ConnectionError, TimeoutError, ChildProcessError, BlockingIOError, InterruptedError)
"""Kinds of OSError that no edit of a file or key mends."""
FULL_DISK_MEND = "make room, then start the same command again: what was written before is complete"
NO_MEMORY = re.compile("can't allocate memory|std::bad_alloc|OutOfMemoryError|MemoryError")
"""How torch, on a CPU and on a GPU, numpy and Python say that there is no memory left."""
NO_MEMORY_MEND = "ask for less at a time: shorter texts, fewer tokens or smaller batches"
_SHORT_KEY = re.compile(r"(?<![\w./-])(model|data)\.([a-z_]+)")
FROM_WORKER = re.compile(r"Caught \w+ in DataLoader worker process \d+\.\n")
LONGEST = 600
"""Characters of a message that are shown: about three lines of a wide terminal."""


def mistake(error: BaseException) -> str | None:
    """Return the line that answers a user's mistake, or None if the error is a defect of the program."""
    message = with_init_args(str(error).strip())
    if isinstance(error, UserError | OSError) and FROM_WORKER.match(message):
        return shorten(message.splitlines()[-1].partition(": ")[2])
    if isinstance(error, UserError):
        return shorten(message)
    if (full := full_disk(error)) is not None:
        return shorten(f"{_os_error(full)}; {FULL_DISK_MEND}")
    if isinstance(error, RuntimeError | MemoryError) and NO_MEMORY.search(f"{type(error).__name__}: {error}"):
        return f"out of memory ({shorten(str(error))[:160]}); {NO_MEMORY_MEND}"
    return shorten(_os_error(error)) if isinstance(error, OSError) and not isinstance(error, NOT_A_MISTAKE) else None


def with_init_args(message: str) -> str:
    """Return a message with the keys of model and data in full: a class knows its own name of a key only."""

    def full(found: re.Match[str]) -> str:
        known = parameters(stages(found[1])[0]) or {}
        return f"{found[1]}.init_args.{found[2]}" if found[2] in known else found[0]

    return _SHORT_KEY.sub(full, message)


def shorten(message: str) -> str:
    """Return a message without line breaks, cut to about three lines."""
    text = " ".join(message.split())
    return text if len(text) <= LONGEST else text[: LONGEST - 4] + " ..."


def _os_error(error: OSError) -> str:
    return str(error) if error.filename is None else f"{error.filename}: {error.strerror}"
