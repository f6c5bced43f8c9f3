"""Lines a person can read, and a clock that counts training alone."""

import pytest
import torch

from callbacks.console import Console, Throughput, duration, number, progress_line, validation_line
from modules.errors import UserError


def test_progress_line_says_where_the_run_is():
    metrics = {"training/loss": torch.tensor(2.5), "training/learning_rate": 3e-4, "training/gradient_norm": 0.5}
    line = progress_line(120, 2000, metrics, 12345.0, 325.4)
    assert line == "step  120/2000    6%  loss 2.5000  lr 3.0e-04  grad 0.5  12.3k tok/s  5m25s left"


def test_progress_line_says_whether_it_is_fast():
    metrics = {"speed/mfu": 0.4567, "speed/data_wait_share": 0.0012}
    assert progress_line(1, 10, metrics, 5.0, 9.0).endswith("5 tok/s  MFU 46%  wait 0%  9s left")


def test_metrics_that_are_not_there_are_left_out():
    assert progress_line(1, 10, {}, 5.0, 9.0) == "step  1/10   10%  5 tok/s  9s left"


def test_no_progress_line_is_wider_than_100_columns():
    worst = {
        "training/loss": 11.7654,
        "training/learning_rate": 4.5e-4,
        "training/gradient_norm": 1.234e10,
        "speed/mfu": 1.0,
        "speed/data_wait_share": 1.0,
    }
    line = progress_line(999_999, 2_980_232, worst, 999_400, 364 * 86400 + 23 * 3600)
    assert len(line) <= 100
    assert line.endswith("999k tok/s  364d23h left")


def test_validation_line_compares_with_gzip():
    metrics = {"validation/loss": 2.0, "validation/bits_per_byte": torch.tensor(1.5), "training/loss": 1.0}
    assert (
        validation_line(3, metrics, 1.8)
        == "validation after step 3: loss 2.0000  bits per byte 1.5000 (gzip -9: 1.8000)"
    )
    assert validation_line(3, metrics, None, "test").startswith("test after step 3: loss ")
    assert "gzip" not in validation_line(3, metrics, None)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1k"), (12345, "12.3k"), (2.5e6, "2.5M"), (3e9, "3G"), (25e12, "25T")],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.6, "1m00s"), (75, "1m15s"), (3725, "1h02m"), (90000, "1d01h")]
)
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text


def test_intervals_below_one_are_refused():
    with pytest.raises(UserError, match=r"console\.every_n_steps is 0"):
        Console(every_n_steps=0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_validation_and_saving_stop_the_clock():
    clock = Clock()
    throughput = Throughput(clock)
    throughput.resume()
    for _ in range(4):
        clock.now += 2  # a step
        throughput.pause()
        throughput.add(100)
        clock.now += 50  # a validation
        throughput.resume()
    throughput.pause()
    assert throughput.read() == pytest.approx(50)
    assert throughput.seconds_left(500) == pytest.approx(10)


def test_what_happens_before_training_and_a_second_fetch_do_not_count():
    """A validation before the first step; several micro-batches in a step."""
    clock = Clock()
    throughput = Throughput(clock)
    clock.now += 100
    for _ in range(3):
        throughput.resume()
        clock.now += 2
    throughput.pause()
    throughput.add(60)
    assert throughput.read() == pytest.approx(10)


def test_speed_is_that_of_the_interval_and_the_rest_is_estimated_smoothly():
    clock = Clock()
    throughput = Throughput(clock)
    for seconds, speed in ((1.0, 100), (4.0, 25)):
        throughput.resume()
        clock.now += seconds
        throughput.pause()
        throughput.add(100)
        assert throughput.read() == pytest.approx(speed)
    assert 1000 / throughput.seconds_left(1000) == pytest.approx(0.7 * 100 + 0.3 * 25)
