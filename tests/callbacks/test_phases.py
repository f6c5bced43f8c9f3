"""Seconds per phase, from moments that may lie ahead of the host."""

import time

import pytest
import torch

from callbacks.phases import CudaClock, HostClock, PhaseClock


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


def test_each_phase_gets_the_time_until_the_next():
    queue = Queue()
    queue.reached = 100.0
    phases = PhaseClock(queue)
    for moment, phase in ((1.0, "data"), (1.5, "forward"), (4.0, "data"), (4.25, "forward"), (8.0, "rest")):
        queue.time = moment
        phases.enter(phase)
    times, seconds = phases.read()
    assert seconds == {"data": 0.75, "forward": 6.25}
    assert times == {"data": 2, "forward": 2}
    queue.time = 9.0
    phases.enter("data")
    assert phases.read() == ({"rest": 1}, {"rest": 1.0})


def test_what_the_device_has_not_reached_is_told_at_a_later_reading():
    queue = Queue()
    phases = PhaseClock(queue)
    for moment, phase in enumerate(["a", "b", "a", "b"]):
        queue.time = float(moment)
        phases.enter(phase)
    assert phases.read() == ({}, {})
    queue.reached = 1.5
    assert phases.read() == ({"a": 1}, {"a": 1.0})
    queue.reached = 3.0
    assert phases.read() == ({"a": 1, "b": 1}, {"a": 1.0, "b": 1.0})


def test_the_host_clock_tells_seconds():
    phases = PhaseClock(HostClock())
    phases.enter("sleep")
    time.sleep(0.02)
    phases.enter("end")
    assert 0.02 <= phases.read()[1]["sleep"] < 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_cuda_clock_tells_the_time_of_the_device_without_waiting():
    phases = PhaseClock(CudaClock())
    x = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        phases.enter("work")
        start = time.perf_counter()
        for _ in range(20):
            x @ x
        queued = time.perf_counter() - start
        phases.enter("end")
        phases.read()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert phases.read()[1]["work"] > queued
