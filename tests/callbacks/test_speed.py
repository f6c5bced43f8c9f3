"""Seconds by part and MFU, of a run whose parts take known times, and of moments that may lie ahead of the host."""

import mmap
import time
from types import SimpleNamespace

import pytest
import torch

import callbacks.speed
from callbacks.peak import Peak, find_peak
from callbacks.speed import PAUSES, STEP, CudaClock, HostClock, PartClock, Speed, gather, resident_bytes
from callbacks.step import StepCallback
from modules.backbone.flops import training_flops_per_token
from modules.pretraining import Pretraining
from tests.callbacks.helpers import run
from tests.modules.helpers import ListData, make_module, row_batches, tiny_config

PEAK = 3e9


class Clock:
    """Moves only where somebody says that something takes time."""

    time = 0.0

    def now(self) -> float:
        return Clock.time

    def is_past(self, moment: float) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start


def spend(seconds: float) -> None:
    Clock.time += seconds


class SlowData(ListData):
    """Takes 1 second for each micro-batch."""

    def windows(self, first):
        for window in super().windows(first):
            spend(len(window.micro_batches))
            yield window


class SlowModule(Pretraining):
    """Takes 2 seconds for each forward pass, 4 for each backward pass, 8 for a step, 16 for writing metrics."""

    def micro_batch_loss(self, batch, totals):
        spend(2)
        return super().micro_batch_loss(batch, totals)

    def backward(self, loss, *args, **kwargs) -> None:
        spend(4)
        super().backward(loss, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer) -> None:
        spend(8)

    def on_train_batch_end(self, *args) -> None:
        spend(16)
        super().on_train_batch_end(*args)

    def validation_step(self, batch, batch_idx) -> None:
        spend(100)
        super().validation_step(batch, batch_idx)


class Between(StepCallback):
    """Takes 1000 seconds between two steps, and 200 for samples behind a validation."""

    def on_step_end(self, trainer, module) -> None:
        spend(1000)

    def on_validation_end(self, trainer, pl_module) -> None:
        spend(200)


@pytest.fixture
def train(monkeypatch):
    """Returns what trains two micro-batches a step and returns the values of each step."""
    monkeypatch.setattr(callbacks.speed, "HostClock", Clock)
    monkeypatch.setattr(callbacks.speed, "find_peak", lambda device, number_format: Peak(PEAK, "test"))

    def run_with(interval: int, **changes) -> dict[int, dict[str, float]]:
        data = SlowData(row_batches(8), window=2, **changes)
        return run(make_module(cls=SlowModule), data, Speed(interval), Between(), val_check_interval=2)

    return run_with


def test_the_parts_of_a_step_are_told_apart(train):
    logged = train(2)
    for step in (2, 4):
        seconds = {part: logged[step][f"speed/seconds/{part}"] for part in (*STEP, *PAUSES)}
        assert seconds == {
            "data_wait": 2,
            "forward": 4,
            "backward": 8,
            "optimizer": 8,
            "other": 16,
            "validation": 0,
            "sampling": 0,
            "checkpoint": 0,
        }
        assert logged[step]["speed/data_wait_share"] == pytest.approx(2 / 38)


def test_mfu_is_the_work_of_a_step_over_what_the_peak_allows(train):
    work = training_flops_per_token(tiny_config(), 16, 2) * 2 * 16
    logged = train(2)
    for step in (2, 4):
        assert logged[step]["speed/mfu"] == pytest.approx(work / 38 / PEAK)


def test_a_cpu_run_tells_no_mfu(train, monkeypatch):
    monkeypatch.setattr(callbacks.speed, "find_peak", find_peak)
    names = {name for values in train(2).values() for name in values}
    assert "speed/data_wait_share" in names
    assert "speed/mfu" not in names


def test_nothing_is_logged_between_the_intervals(train):
    logged = train(2)
    assert not any(name.startswith(("speed/", "memory/")) for step in (1, 3) for name in logged[step])


def test_pauses_are_not_part_of_a_step(train):
    logged = train(1, validation=row_batches(1))
    shares = [values["speed/pause_share"] for values in logged.values()]
    assert shares == pytest.approx([0, 0, 300 / 338, 0])
    assert logged[3]["speed/seconds/validation"] == 100
    assert logged[3]["speed/seconds/sampling"] == 200
    assert logged[3]["speed/mfu"] == pytest.approx(logged[4]["speed/mfu"])


def test_host_memory_grows_with_what_is_held():
    held = mmap.mmap(-1, 50 << 20)  # new pages: the heap may have 50 MiB left of earlier tests
    before = resident_bytes()
    torch.frombuffer(held, dtype=torch.uint8).fill_(1)
    assert 40 << 20 < resident_bytes() - before < 80 << 20


def test_one_process_gathers_its_own_numbers():
    assert gather([1.0, 2.0], SimpleNamespace(world_size=1)) == [[1.0, 2.0]]


class Queue:
    """A clock whose device has only come to `reached`: the host runs ahead of it, as on CUDA."""

    time = 0.0
    reached = 0.0

    def now(self) -> float:
        return self.time

    def is_past(self, moment: float) -> bool:
        return moment <= self.reached

    def seconds(self, start: float, end: float) -> float:
        assert end <= self.reached, "asked before the device is there"
        return end - start


def test_each_part_gets_the_time_until_the_next():
    queue = Queue()
    queue.reached = 100.0
    parts = PartClock(queue)
    for moment, part in ((1.0, "data"), (1.5, "forward"), (4.0, "data"), (4.25, "forward"), (8.0, "rest")):
        queue.time = moment
        parts.enter(part)
    times, seconds = parts.read()
    assert seconds == {"data": 0.75, "forward": 6.25}
    assert times == {"data": 2, "forward": 2}
    queue.time = 9.0
    parts.enter("data")
    assert parts.read() == ({"rest": 1}, {"rest": 1.0})


def test_what_the_device_has_not_reached_is_told_at_a_later_reading():
    queue = Queue()
    parts = PartClock(queue)
    for moment, part in enumerate(["a", "b", "a", "b"]):
        queue.time = float(moment)
        parts.enter(part)
    assert parts.read() == ({}, {})
    queue.reached = 1.5
    assert parts.read() == ({"a": 1}, {"a": 1.0})
    queue.reached = 3.0
    assert parts.read() == ({"a": 1, "b": 1}, {"a": 1.0, "b": 1.0})


def test_the_host_clock_tells_seconds():
    parts = PartClock(HostClock())
    parts.enter("sleep")
    time.sleep(0.02)
    parts.enter("end")
    assert 0.02 <= parts.read()[1]["sleep"] < 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_cuda_clock_tells_the_time_of_the_device_without_waiting():
    parts = PartClock(CudaClock())
    x = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        parts.enter("work")
        start = time.perf_counter()
        for _ in range(20):
            x @ x
        queued = time.perf_counter() - start
        parts.enter("end")
        parts.read()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert parts.read()[1]["work"] > queued
