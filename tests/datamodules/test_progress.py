"""Plain lines of progress, as logs get them."""

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
    assert capsys.readouterr().out == line + "\n"
