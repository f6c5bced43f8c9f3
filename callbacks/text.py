"""Lines for the console: at most `WIDTH` columns wide, but for words that must stay whole (paths, commands)."""

import textwrap

WIDTH = 100
LABEL = 12
"""Columns of what stands before an entry of the table at the start."""


def fold(text: str, indent: int = 2) -> str:
    """Return a line broken between words, its further lines indented."""
    lines = textwrap.wrap(
        text,
        WIDTH,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        expand_tabs=False,
    )
    return "\n".join(lines)


def entry(label: str, text: str) -> str:
    """Return an entry of the table at the start of a run."""
    return fold(f"{label:<{LABEL}}{text}", LABEL)


def quote(text: str, indent: str = "    ") -> str:
    """Return a text as it is, its lines indented and a line that is too long cut where it must be, with a sign.

    Control characters are shown, so that no text steers the terminal.
    """
    shown = text.expandtabs(4).translate(_SHOWN)
    room = WIDTH - len(indent)
    lines: list[str] = []
    for line in shown.split("\n"):
        first, rest = line[:room], line[room:]
        lines += [first, *(f"↪ {rest[at : at + room - 2]}" for at in range(0, len(rest), room - 2))]
    return "\n".join(f"{indent}{line}".rstrip() for line in lines)


_SHOWN = {code: chr(0x2400 + code) for code in range(32) if code != 10} | {
    127: "␡",
    **{code: f"⟨{code:04X}⟩" for code in (*range(0x80, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A))},
}
"""Characters that would move the cursor, or turn the text around, as a sign."""
