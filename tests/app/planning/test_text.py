"""Numbers for people."""

import pytest

from app.planning.text import align, byte_unit, duration, with_prefix


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "less than a second"),
        (1, "1 second"),
        (59.4, "59 seconds"),
        (59.7, "1 minute"),
        (61, "1 minute 1 second"),
        (3599.9, "1 hour"),
        (3600 * 25, "1 day 1 hour"),
        (86_400 * 1366 + 7200, "1,366 days 2 hours"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0 FLOP"), (12.0, "12 FLOP"), (88.2538e9, "88.25 GFLOP"), (999.99e9, "1 TFLOP"), (2.206e24, "2.206 YFLOP")],
)
def test_prefix(value: float, text: str) -> None:
    assert with_prefix(value, "FLOP") == text


def test_unit_of_bytes() -> None:
    assert [byte_unit(size)[1] for size in (0, 10 * 2**10, 9 * 2**30, 10 * 2**30, 2**50)] == [
        "B",
        "KiB",
        "MiB",
        "GiB",
        "TiB",
    ]


def test_columns() -> None:
    assert align([("a", "1"), ("bcd", "234")]) == ["a      1", "bcd  234"]
