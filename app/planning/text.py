"""Numbers and tables for the terminal."""

import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 100
"""Columns of a terminal that every line fits in, unless a single word is longer."""

_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
_PREFIXES = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def align(rows: Sequence[Sequence[str]], text_columns: tuple[int, ...] = (0,)) -> list[str]:
    """Align rows of equal length in columns: text to the left, numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index in text_columns else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def wrap(lines: Iterable[str], indent: str = "") -> list[str]:
    """Return lines with those that are too long broken between words, what follows a break behind `indent`."""
    return [
        part
        for line in lines
        for part in (
            [line]
            if len(line) <= WIDTH
            else textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        )
    ]


def byte_unit(largest: int) -> tuple[int, str]:
    """Return (bytes, name) of the unit in which `largest` has at least two digits before the point."""
    return next((size, name) for size, name in _UNITS if largest >= 10 * size or size == 1)


def with_prefix(value: float, unit: str) -> str:
    """Return a value with four digits and a decimal prefix, e.g. `88.25 GFLOP`."""
    value = float(f"{value:.4g}")
    size, name = prefix(value)
    return f"{value / size:.4g} {name}{unit}"


def prefix(largest: float) -> tuple[float, str]:
    """Return (size, decimal prefix) of the unit in which `largest` has one to three digits before the point."""
    return next(((size, name) for size, name in _PREFIXES if abs(largest) >= size), (1.0, ""))


def duration(seconds: float) -> str:
    """Return a length of time in its two largest units (days at most), e.g. `3 days 4 hours`."""
    minutes, hours, days = (60 * round(seconds / 60), 3600 * round(seconds / 3600), 86_400)
    if hours >= days:
        parts = [(hours // days, "day"), (hours % days // 3600, "hour")]
    elif minutes >= 3600:
        parts = [(minutes // 3600, "hour"), (minutes % 3600 // 60, "minute")]
    else:
        parts = [(round(seconds) // 60, "minute"), (round(seconds) % 60, "second")]
    named = [f"{count:,} {name}{'' if count == 1 else 's'}" for count, name in parts if count]
    return " ".join(named) or "less than a second"
