"""The one error type for a user's mistake.

Whatever we refuse raises it; it costs one to three lines and exit code 2. Any other error is a defect of ours, or of
the machine, and keeps its traceback. It is a `ValueError` because the parser of run files takes those for its answer.
A full disk is the user's to mend too, whatever error a library raises for it.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """A mistake of the user; the message names the key or file and the mend."""


FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_DISK_TEXT = re.compile(r"No space left on device|Disk quota exceeded|File too large")
"""How libraries tell it that have no OSError."""


def full_disk(error: BaseException | None) -> OSError | None:
    """Return the full disk behind an error, or None if there is none; libraries raise others in its place."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            return error
        if not isinstance(error, UserError) and (found := FULL_DISK_TEXT.search(str(error))):
            return OSError(errno.ENOSPC, found[0])
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Let an error of the system, and a full disk whatever a library makes of it, name the path that is written.

    Raises:
        OSError: with the path as its `filename`, unless it names one already.
    """
    try:
        yield
    except Exception as error:
        reason = full_disk(error) or error
        if not isinstance(reason, OSError):
            raise
        raise OSError(reason.errno, reason.strerror or str(reason), str(reason.filename or path)) from error
