"""What a model writes, on its way to a terminal, and what people write there."""

import sys

_CONTROL = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def read_text(text: str) -> str:
    """Return a text of the command line or of stdin with U+FFFD for each byte that is not UTF-8."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def write_text(text: str) -> None:
    """Write a piece of text to stdout at once; on a terminal control characters show as U+FFFD and steer nothing."""
    print(text.translate(_CONTROL) if sys.stdout.isatty() else text, end="", flush=True)
