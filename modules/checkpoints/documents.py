"""Reading JSON files that other people wrote: one clear line where they are damaged."""

import json
from pathlib import Path
from typing import Any

from modules.errors import UserError


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: it is not JSON (a Git LFS pointer, a download cut short), or no object; names the file and the mend.
        OSError: it cannot be opened.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # the latter for brackets within brackets, as in no file of a model
        raise UserError(f"{file} is not valid JSON ({error}); copy or download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} holds a JSON {type(value).__name__} where an object is needed; copy it again")
    return value
