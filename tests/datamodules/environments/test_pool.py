"""Checkers that raise, hang, eat memory or die cost their sample, and nothing else; nobody outlives the parent."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from datamodules.environments.draws import is_held_out
from datamodules.environments.pool import Pool
from modules.batch import Judgement
from modules.errors import UserError
from tests.datamodules.environments.helpers import rogue


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    rogues = {"rogue": rogue(), "few": rogue(texts=1), "formless": rogue("Formless"), "none": rogue("Unanswered")}
    with Pool(rogues, processes=2, seconds=1) as pool:
        yield pool


def test_each_failure_is_named_and_costs_one_sample(pool: Pool, capfd: pytest.CaptureFixture[str]):
    (problem,) = pool.problems("rogue", 0, [0], held_out=True)
    replies = ["right", "raise", "left", "sleep", "right", "exit", "backtrack", "die", "eat", "print", "right"]
    found = pool.judge("rogue", [(problem, reply) for reply in replies])
    assert [judgement.failure for judgement in found] == [
        None,
        "KeyError: 'no such thing'",
        None,
        "took longer than 1 s",
        None,
        "SystemExit: 3",
        "took longer than 1 s",
        "the process ended (exit code 7)",
        "MemoryError: ",
        None,
        None,
    ]
    assert [judgement.reward for judgement in found if judgement.failure is None] == [1, 0, 1, 0, 1]
    assert capfd.readouterr().out == ""


def test_what_is_no_judgement_and_no_turn_is_a_failure(pool: Pool):
    (problem,) = pool.problems("formless", 0, [0], held_out=True)
    shapes = ["none", "text", "pair", "dict", "list"]
    judged = pool.judge("formless", [(problem, reply) for reply in [*shapes, "nan", "inf", "high"]])
    assert all("no Judgement" in str(found.failure) for found in judged[:5])
    assert all("no finite number" in str(found.failure) for found in judged[5:])
    said = [*shapes, "mute", "raise", "sleep"]
    turns = pool.respond("formless", [(problem, [{"role": "assistant", "content": text}]) for text in said])
    failures = [found.failure for found in turns if isinstance(found, Judgement)]
    assert len(failures) == len(said)
    assert all("no list of turns" in str(failure) for failure in failures[:6])
    assert failures[6:] == ["KeyError: 'no such thing'", "took longer than 1 s"]


def test_problems_come_in_the_order_of_their_numbers(pool: Pool):
    numbers = [*range(70), 3]
    problems = pool.problems("rogue", 5, numbers, held_out=False)
    assert problems[3] == problems[70]
    assert problems == [pool.problems("rogue", 5, [number], held_out=False)[0] for number in numbers]


def test_what_cannot_be_drawn_is_the_users_to_mend(pool: Pool):
    side = is_held_out("question 0")
    with pytest.raises(UserError, match=r"environments\.few: none of 256 problems is .*too few different ones"):
        pool.problems("few", 0, [0], not side)
    with pytest.raises(UserError, match=r"environments\.rogue: Rogue has no worked solutions"):
        list(pool.rows("rogue", 0, [0]))
    with pytest.raises(UserError, match=r"environments\.none: .*the answer of a problem must be a text, not 5"):
        pool.problems("none", 0, [0], held_out=True)


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ("chain_sum", "takes class_path and init_args"),
        ({"init_args": {}}, "takes class_path and init_args"),
        ({"class_path": "a.B", "init_args": {}, "seed": 1}, "takes class_path and init_args"),
        ({"class_path": "a.B"}, r"environments\.x: .*No module named 'a'"),
        (rogue(colour="red"), r"environments\.x: .*unexpected keyword argument 'colour'"),
    ],
)
def test_a_definition_that_is_none_is_named(definition: object, message: str):
    with pytest.raises(UserError, match=message), Pool({"x": definition}) as pool:  # type: ignore[dict-item]
        pool.problems("x", 0, [0], held_out=False)


def test_no_process_is_left_behind_when_the_pool_closes():
    before = set(multiprocessing.active_children())
    with Pool({"rogue": rogue()}) as pool:
        pool.problems("rogue", 0, [0], held_out=True)
        assert len(set(multiprocessing.active_children()) - before) == 1
    assert set(multiprocessing.active_children()) == before


PARENT = """
import multiprocessing, threading
from datamodules.environments.draws import is_held_out
from datamodules.environments.pool import Pool
from tests.datamodules.environments.helpers import rogue
if __name__ == "__main__":
    with Pool({"rogue": rogue()}, seconds=WAIT) as pool:
        (problem,) = pool.problems("rogue", 0, [0], held_out=True)
        print(multiprocessing.active_children()[0].pid, flush=True)
        pool.judge("rogue", [(problem, "REPLY")])
        input()
"""


def ends(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("reply", ["right", "sleep", "backtrack"])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_worker_ends_with_its_parent(reply: str, end: signal.Signals, tmp_path, request: pytest.FixtureRequest):
    file = tmp_path / "parent.py"
    file.write_text(PARENT.replace("REPLY", reply).replace("WAIT", "3"))
    environment = {**os.environ, "PYTHONPATH": str(request.config.rootpath)}
    with subprocess.Popen(
        [sys.executable, file],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        time.sleep(0.3)
        parent.send_signal(end)
        parent.wait()
    assert ends(worker, 30)
