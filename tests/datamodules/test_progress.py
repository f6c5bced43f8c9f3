"""Plain lines of progress, as logs get them."""

from contextlib import suppress

import pytest

from datamodules import progress
from datamodules.progress import ProgressBar


@pytest.mark.parametrize(
    ("unit", "line"),
    [("B", "reading: 1.5 of 6.0 MB (25%)"), ("tokens", "reading: 1,500,000 of 6,000,000 tokens (25%)")],
)
def test_a_line_says_how_much_is_done(capsys, monkeypatch, unit: str, line: str) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1.0)
    with ProgressBar("reading", 6_000_000, done=500_000, unit=unit) as shown:
        shown.advance(1_000_000)
        assert capsys.readouterr().err == line + "\n"


def test_a_job_that_told_how_far_it_is_ends_at_100_percent(capsys, monkeypatch) -> None:
    times = iter([0.0, 6.0, 6.0, 7.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    with ProgressBar("calibrating", 300, unit="tokens") as shown:
        shown.advance(100)
        shown.advance(200)
    assert capsys.readouterr().err == "calibrating: 100 of 300 tokens (33%)\ncalibrating: 300 of 300 tokens (100%)\n"


def test_a_job_that_fails_or_was_short_tells_no_end(capsys, monkeypatch) -> None:
    with ProgressBar("short", 3) as shown:
        shown.advance(3)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1.0)
    with suppress(ZeroDivisionError), ProgressBar("failing", 2, unit="rows") as shown:
        shown.advance(1)
        raise ZeroDivisionError
    assert capsys.readouterr().err == "failing: 1 of 2 rows (50%)\n"
