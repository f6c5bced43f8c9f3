"""Metrics of a step: how values of micro-batches and ranks join, and that each is written once."""

import pytest
import torch
from torch import Tensor

from modules.metrics import Metrics

CPU = torch.device("cpu")


def two_ranks(other: dict[str, list[float]]):
    """Reduces with what another rank has recorded."""

    def all_reduce(tensor: Tensor, op: str) -> Tensor:
        theirs = torch.tensor(other[op], dtype=tensor.dtype).view_as(tensor)
        return torch.maximum(tensor, theirs) if op == "max" else tensor + theirs

    return all_reduce


def test_values_join_over_micro_batches_and_ranks() -> None:
    metrics = Metrics()
    for value in (1.0, 2.5):
        metrics.record("sum", torch.tensor(value), "sum")
        metrics.record("max", value, "max")
    assert dict(metrics) == {}, "nothing is known before the step ends"
    found = metrics.end_step(two_ranks({"sum": [10.0], "max": [2.0]}), CPU)
    assert {name: value.item() for name, value in found.items()} == {"sum": 13.5, "max": 2.5}
    assert metrics["sum"] == 13.5
    assert metrics.end_step(two_ranks({}), CPU) == {}, "a step begins anew"
    for value in (1.0, 2.0, 6.0):
        metrics.record("mean", value, "mean")
    assert metrics.end_step(two_ranks({"sum": [7.0, 1.0]}), CPU)["mean"] == pytest.approx((1 + 2 + 6 + 7) / 4)


def test_numbers_of_the_host_join_those_of_a_device() -> None:
    metrics, device = Metrics(), torch.device("meta")
    metrics.record("on the device", torch.ones((), device=device), "sum")
    for reduce in ("sum", "mean", "max"):
        metrics.record(f"host {reduce}", 2.0, reduce)
    found = metrics.end_step(lambda tensor, op: tensor, device)
    assert {value.device for value in found.values()} == {device}


def test_what_is_recorded_is_written_once() -> None:
    metrics = Metrics()
    metrics.record("a", torch.tensor(1.5, dtype=torch.float64))
    metrics.record_all({"b": 2.0, "a": torch.tensor(3)})
    metrics.record("step", 1.0, "sum")
    assert metrics.take_unwritten() == {"a": 3.0, "b": 2.0}
    assert metrics.take_unwritten() == {}
    assert (metrics["a"], metrics["b"]) == (3, 2.0), "the newest stay to be read"
