"""A side of a comparison: a process that answers, and that is missed when it is gone."""

import os
from multiprocessing.connection import Connection

import pytest

from benchmarks.side import Side


def serve(connection: Connection, factor: float) -> None:
    connection.send("ready")
    while (request := connection.recv()) is not None:
        if request == "end":
            os._exit(3)
        connection.send((factor, factor * request))


def test_ratios_are_of_neighbouring_turns():
    sides = [Side(str(factor), serve, factor) for factor in (1.0, 3.0)]
    assert [side.ready for side in sides] == ["ready", "ready"]
    for side in sides:
        side.turn(2)
        side.turn(2)
        side.times[2].append((side.times[2][0][0], 100.0))  # a turn that something else slowed, of both
    slow, fast = sides[1], sides[0]
    assert slow.ratio(fast, 2, 0) == slow.ratio(fast, 2, 1) == 3
    assert slow.median(2, 1) == 6
    for side in sides:
        side.close()


def test_a_side_that_ends_is_named():
    side = Side("ours", serve, 1.0)
    with pytest.raises(SystemExit, match="process of ours ended with exit code 3"):
        side.ask("end")
