"""Leaving at once: one line, nothing left behind, whatever the program is at."""

import os
import signal
import subprocess
import sys

import pytest

from tests.app.helpers import ROOT

LISTEN = "import time; from callbacks.stop_request import STOP; STOP.listen()\n"
WORKERS = """\
from datamodules.text.workers import Workers
with Workers(2) as workers:
    for _ in workers.run(print, ["ready"] * 2):
        pass
    list(workers.run(time.sleep, [60] * 4))
"""
SWALLOWS = """\
while True:
    try:
        print("ready", flush=True)
        time.sleep(60)
    except BaseException:
        pass
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)])
@pytest.mark.parametrize("program", [WORKERS, SWALLOWS])
def test_it_leaves_at_once_with_one_line(program, number, code):
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", LISTEN + program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    (line,) = errors.splitlines()
    assert line.startswith(f"interrupted by {number.name}; the same command goes on")


def test_only_the_first_process_speaks_and_repeats_within_a_second_are_one_wish():
    """torchrun passes on to each process what the terminal has sent to it already."""
    code = LISTEN + (
        "import os, signal; STOP.can_save = True\n"
        "for _ in range(3): os.kill(os.getpid(), signal.SIGINT)\n"
        "print(STOP.name, STOP.exit_code)"
    )
    for rank, lines in (("0", 1), ("1", 0)):
        environment = {**os.environ, "RANK": rank}
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30)
        assert result.stdout == "SIGINT 130\n"
        assert len(result.stderr.splitlines()) == lines


def test_a_process_that_was_started_by_the_first_one_passes_the_signal_on():
    """Where one of them leaves by itself, Lightning kills the first one."""
    child = "import os, signal; os.kill(os.getpid(), signal.SIGTERM); print('child stays', flush=True); time.sleep(60)"
    code = LISTEN + (
        "import os, subprocess, sys\n"
        "os.environ['SUPERBOLT_STARTED_BY'] = str(os.getpid())\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], env={**os.environ, 'LOCAL_RANK': '1'})\n"
        "STOP.before_leaving.append(child.kill)\n"
        "child.wait(); print('child left')\n"
    )
    command = [sys.executable, "-c", code, LISTEN + child]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert result.returncode == 143
    assert "child left" not in result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("interrupted by SIGTERM")
