"""The learning rate as a picture of text."""

from app.planning.schedule import plot
from modules.optim.schedule import ScheduleConfig


def heights(lines: list[str]) -> list[int]:
    """Row of the mark in each column, 0 the lowest."""
    rows = [line.partition("|")[2] for line in lines if "|" in line]
    assert sum(row.count("*") for row in rows) == 64, "one mark a column"
    return [
        next(len(rows) - 1 - index for index, row in enumerate(rows) if row[column : column + 1] == "*")
        for column in range(64)
    ]


def test_the_plot_follows_the_schedule() -> None:
    marks = heights(plot(ScheduleConfig(warmup_tokens=16_000, decay_tokens=32_000, minimum_ratio=0.0), 1e-3, 64_000))
    assert marks[:16] == sorted(marks[:16]), "rises"
    assert marks[0] == 0
    assert set(marks[16:32]) == {7}, "stays"
    assert marks[32:] == sorted(marks[32:], reverse=True), "falls"
    assert marks[-1] == 0
    assert marks[40] <= 4, "the root falls at once: half is lost after a quarter"


def test_a_constant_rate_is_a_line() -> None:
    lines = plot(ScheduleConfig(), 0.02, 5_000_000_000)
    assert set(heights(lines)) == {7}
    assert lines[0].startswith("  0.02 |***")
    assert lines[-1].split() == ["0", "2.5", "G", "5", "G", "tokens"]
