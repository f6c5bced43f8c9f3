"""What a run's folder says about the run."""

import itertools
import os
import re
import signal
import subprocess
import sys

import pytest

from app.run_folder import RunFolder, differences, flatten
from modules.checkpoints import folder
from modules.errors import UserError
from tests.app.helpers import ROOT


def test_differences_name_key_old_and_new(tmp_path):
    (tmp_path / "config.yaml").write_text("a: 1\nb: {c: x, d: [1, 2]}\ngone: true\nlist: [{p: 1}, {p: 2}]\n")
    now = "a: 1\nb: {c: y, d: [1, 3]}\nnew: null\nlist: [{p: 1}, {p: 3}]\n"
    assert differences(tmp_path, now) == [
        "b.c: x -> y",
        "b.d: [1, 2] -> [1, 3]",
        "gone: True -> (absent)",
        "list[1].p: 2 -> 3",
        "new: (absent) -> null",
    ]
    assert differences(tmp_path, (tmp_path / "config.yaml").read_text()) == []


def test_long_values_are_shortened(tmp_path):
    (tmp_path / "config.yaml").write_text("a: " + "x" * 100)
    (line,) = differences(tmp_path, "a: y")
    assert len(line) < 80


def test_empty_containers_are_values():
    assert flatten({"a": {}, "b": []}) == {"a": {}, "b": []}


def make(run: RunFolder, step: int) -> None:
    target = run.checkpoints / f"step={step:08d}"
    (folder.begin(target) / "file").write_text("x")
    folder.publish(target, {"step": step})


def test_the_newest_complete_checkpoint_is_taken(tmp_path):
    run = RunFolder(tmp_path, "a")
    assert run.newest() == (None, [])
    make(run, 3)
    make(run, 6)
    (run.checkpoints / "step=00000006" / "file").write_text("y")
    newest, passed = run.newest()
    assert newest is not None
    assert newest.name == "step=00000003"
    assert len(passed) == 1
    assert "step=00000006 is damaged and passed over: file has changed" in passed[0]


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(tmp_path):
    run = RunFolder(tmp_path, "a")
    make(run, 3)
    (run.checkpoints / "step=00000003" / "file").unlink()
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged \(file is missing\)"):
        run.newest()


def test_a_half_written_checkpoint_does_not_count(tmp_path):
    run = RunFolder(tmp_path, "a")
    folder.begin(run.checkpoints / "step=00000003")
    assert run.newest() == (None, [])
    run.clean()
    assert list(run.checkpoints.iterdir()) == []


def test_config_is_replaced_in_one_step(tmp_path):
    run = RunFolder(tmp_path, "a")
    run.save_config("one")
    run.save_config("two")
    assert (run.path / "config.yaml").read_text() == "two"
    assert [path.name for path in run.path.iterdir()] == ["config.yaml"]


def test_a_lock_leaves_nothing_unless_something_was_written(tmp_path):
    run = RunFolder(tmp_path / "runs", "a")
    with run.locked():
        assert re.fullmatch(rf"process {os.getpid()} on \S+ since .*", run.holder())
    assert list(tmp_path.iterdir()) == []
    with run.locked():
        run.save_config("x")
    assert sorted(path.name for path in run.path.iterdir()) == ["config.yaml", "lock"]


def test_a_lock_is_not_kept_by_a_dead_process_nor_by_its_child(tmp_path):
    """The child of a killed process, as a loader's worker that was forked, outlives it here."""
    code = (
        "import os, sys, time; from pathlib import Path; from app.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1]), 'a').locked():\n"
        "    child = os.fork(); print(child, flush=True) if child else None; time.sleep(60)"
    )
    run = RunFolder(tmp_path, "a")
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        assert run.is_locked
        with pytest.raises(UserError, match=r"run a \(.*\) is being trained by process \d+ on "), run.locked():
            pass
        process.kill()
        process.wait()
        assert not run.is_locked
        with run.locked():
            pass
    finally:
        process.kill()
        os.kill(child, signal.SIGKILL)


def test_later_checkpoints_are_set_aside_each_time_anew(tmp_path):
    run = RunFolder(tmp_path, "a")
    assert run.set_aside_after(0) is None
    for number in (1, 2):
        make(run, 3)
        make(run, 6)
        assert run.set_aside_after(3) == run.path / "set_aside" / str(number)
        assert [folder.step_of(path) for path in folder.checkpoints(run.checkpoints)] == [3]


def test_starts_at_the_same_moment_never_overlap_and_leave_nothing(tmp_path):
    """Some give the run up at once, as refused ones do, and remove the folder in which the others look for the lock."""
    code = (
        "import sys, time; from pathlib import Path; from app.run_folder import RunFolder\n"
        "run, spans = RunFolder(Path(sys.argv[1]), 'a'), []\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for number in range(40):\n"
        "    with run.locked(): start = time.monotonic(); time.sleep(number % 3 / 1000); end = time.monotonic()\n"
        "    print(start, end, flush=True)\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "all" / "runs"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    starts = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(3)]
    for start in starts:
        assert start.stdout is not None
        assert start.stdout.readline() == "ready\n"
    for start in starts:
        assert start.stdin is not None
        start.stdin.write("go\n")
        start.stdin.flush()
    lines = [line for start in starts for line in start.communicate(timeout=60)[0].splitlines()]
    assert [start.returncode for start in starts] == [0, 0, 0]
    spans = sorted(tuple(map(float, line.split())) for line in lines)
    assert len(spans) == 120
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(spans))
    assert not (tmp_path / "all" / "runs" / "a").exists()
