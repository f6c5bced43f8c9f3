"""A run that is stopped, at any moment and in any way, keeps what it promised; one name is one process."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from modules.checkpoints import folder
from tests.app.helpers import ROOT, kill_when, load_tensors, losses, same_checkpoint, scalars, wait_for
from tests.app.test_resume import STEPS, Run, assert_curves_whole, whole  # noqa: F401 (a fixture)

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
STOPS = min(60, int(os.environ.get("SUPERBOLT_KILLS", "6")))


@pytest.mark.parametrize("workers", [0, 2])
def test_signals_at_random_moments_lose_nothing(program, whole, tmp_path, workers):  # noqa: F811
    """What a signal promises on its way out is on the disk; equal bytes and curves in the end."""
    run = Run(program, tmp_path / "runs", f"--data.init_args.num_workers={workers}")
    chance = random.Random(10 + workers)
    for _ in range(STOPS):
        number = chance.choice(list(CODES))
        target = run.steps_done() + chance.randrange(0, max(2, STEPS // STOPS))
        kill = kill_when(lambda target=target: run.steps_done() >= target, 0.3 * chance.random() ** 2, number)
        result = run.start(meanwhile=kill)
        if number != signal.SIGKILL:  # the workers that it leaves behind complain
            assert "Traceback" not in result.output
        if result.code == 0:
            break
        if not result.output:  # it came before the program's first line
            assert result.code in (CODES[number], -number)
            continue
        assert result.code == CODES[number], result.output
        if saved := re.search(r"stopped by \w+ at step (\d+): saved (\S+)", result.output):
            assert folder.damage(Path(saved[2])) is None
            assert int(saved[1]) == run.steps_done()
        elif number != signal.SIGKILL:
            assert re.search(r"^interrupted\b.*; the same command goes on", result.output, re.MULTILINE)
    assert run.start().code == 0
    assert losses(run.losses) == losses(whole.losses)
    same_checkpoint(run.last, whole.last)
    assert_curves_whole(run.folder)


def test_a_second_interrupt_stops_at_once(program, tmp_path):
    run = Run(program, tmp_path / "runs", "--trainer.callbacks=[{class_path: tests.app.standin.Wait}]")

    def twice(pid: int) -> None:
        wait_for(lambda: "waiting" in program.output())
        os.kill(pid, signal.SIGINT)
        time.sleep(1.2)
        os.kill(pid, signal.SIGINT)

    result = run.start(meanwhile=twice)
    assert result.code == 130
    assert "SIGINT: the run is saved at the end of this step" in result.output
    assert result.output.splitlines()[-1].startswith("stopped at once by a second signal, SIGINT")
    assert not (run.folder / "checkpoints").exists()


def test_an_interrupt_before_the_first_step_leaves_no_folder(program, tmp_path):
    run = Run(program, tmp_path / "runs", "--trainer.callbacks=[{class_path: tests.app.standin.Wait}]")
    started = run.folder / "lock"
    result = run.start(meanwhile=kill_when(started.exists, number=signal.SIGINT))
    assert result.code == 130
    *_, interrupted = result.output.splitlines()
    assert interrupted.startswith("interrupted by SIGINT")
    assert not run.folder.exists()


def test_one_name_is_one_process(program, tmp_path):
    """The second says who the first is; a killed one keeps nothing."""
    run = Run(program, tmp_path / "runs", "--trainer.callbacks=[{class_path: tests.app.standin.Wait}]")
    command = [sys.executable, "-m", "app", *run.args]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        assert any(line == "waiting\n" for line in first.stdout)
        config = (run.folder / "config.yaml").read_text()
        result = run.start()
        assert result.code == 2
        *_, line = result.unfolded.splitlines()
        assert line.startswith("error: run run (")
        assert f"is being trained by process {first.pid} on " in line
        assert (run.folder / "config.yaml").read_text() == config
        assert "\nerror: " in f"\n{program.run('validate', *run.args[1:]).output}", "no checkpoint yet"
        assert re.search(r"^run +running", program.run("runs", tmp_path / "runs").output, re.MULTILINE)
    finally:
        first.kill()
        first.wait()
    result = run.start("--trainer.max_steps=2", "--trainer.callbacks=null")
    assert result.code == 0, result.output


def test_a_time_limit_is_that_of_one_start(program, whole, tmp_path):  # noqa: F811
    run = Run(program, tmp_path / "runs")
    slow = "--trainer.callbacks=[{class_path: tests.app.standin.Wait, init_args: {seconds: 1.1}}]"
    for _ in range(2):
        before = run.steps_done()
        result = run.start("--trainer.max_time=00:00:00:01", slow)
        assert result.code == 0, result.output
        step = run.steps_done()
        assert step == before + 1, "the time of an earlier start counts"
        assert f"trainer.max_time is over at step {step}: saving" in result.output
        assert f"stopped before step {STEPS}; the same command goes on" in result.output
        assert (run.folder / "checkpoints" / f"step={step:08d}").is_dir()
    assert run.start().code == 0
    assert losses(run.losses) == losses(whole.losses)


def test_retention(program, tmp_path):
    """The newest, every n-th, and the best; told from the disk, so a deletion or another start change nothing."""
    options = ("keep_last=1", "keep_every_n_steps=9", "keep_best=2", "best_metric=validation/bits_per_byte")
    run = Run(program, tmp_path / "runs", *(f"--checkpoint.{option}" for option in options))
    assert run.start("--trainer.max_steps=13").code == 0
    assert run.start().code == 0
    steps, values = (scalars(run.folder, values)["validation/bits_per_byte"] for values in (False, True))
    validated = {step: value for step, value in zip(steps, values, strict=True) if step in (12, 13, STEPS)}
    best = sorted(validated, key=lambda step: validated[step])
    checkpoints = run.folder / "checkpoints"
    kept = {folder.step_of(path) for path in folder.checkpoints(checkpoints)}
    assert kept == {9, 18, STEPS, *best[:2]}
    assert (checkpoints / "best").resolve().name == f"step={best[0]:08d}"
    result = program.run("validate", *run.args[1:], f"--ckpt_path={checkpoints / 'best'}")
    assert f"validation after step {best[0]}: " in result.unfolded
    assert f"bits per byte {validated[best[0]]:.4f}" in result.unfolded


def test_a_run_goes_back_to_a_step_and_keeps_what_came_after(program, whole, tmp_path):  # noqa: F811
    run = Run(program, tmp_path / "runs", "--checkpoint.keep_last=9")
    assert run.start("--trainer.max_steps=9").code == 0
    checkpoints = run.folder / "checkpoints"
    options = (f"--ckpt_path={checkpoints / 'step=00000003'}", "--trainer.max_steps=7", "--model.init_args.rate=0.02")
    result = run.start(*options)
    assert result.code == 0, result.output
    assert "goes on after step 3 of 7" in result.unfolded
    assert f"later checkpoints of the run are kept in {run.folder / 'set_aside' / '1'}" in result.output
    assert [folder.step_of(path) for path in folder.checkpoints(run.folder / "set_aside" / "1")] == [9, 6]
    assert [folder.step_of(path) for path in folder.checkpoints(checkpoints)] == [7, 6, 3]
    assert scalars(run.folder)["training/loss"] == list(range(1, 8))
    assert run.start(f"--ckpt_path={run.folder / 'set_aside' / '1' / 'step=00000009'}").code == 0
    ours, theirs = load_tensors(run.last), load_tensors(whole.last)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    other = Run(program, tmp_path / "others")
    result = other.start(f"--ckpt_path={run.last}")
    assert result.code == 2
    assert f"is no checkpoint of run run ({other.folder})" in result.output
    assert "--model.init_args.init_from" in result.output
    assert not other.folder.exists()


def test_an_end_before_the_checkpoint_is_refused(program, tmp_path):
    run = Run(program, tmp_path / "runs")
    assert run.start("--trainer.max_steps=6").code == 0
    result = run.start("--trainer.max_steps=4")
    assert result.code == 2
    assert "trainer.max_steps: the run is to end at step 4, but " in result.output
    assert "is of step 6 already" in result.output
    result = run.start("--trainer.max_steps=6", "--console.every_n_steps=2")
    assert result.code == 0
    assert "is finished: 6 steps" in result.unfolded
    assert "changed since, to no effect:\n  console.every_n_steps: 4 -> 2" in result.output


@pytest.mark.parametrize(
    "option",
    [
        "--data.init_args.missing=/nowhere/x",
        "--model.init_args.width=0",
        "--trainer.accelerator=gpux",
        "--trainer.max_time=soon",
        "--trainer.strategy=ddp",
        "--checkpoint.keep_every_n_steps=4",
        "--checkpoint.best_metric=loss",
        "--data.init_args.steps=9",
        "--model.init_args.init_from=/nowhere",
    ],
)
def test_a_rejected_configuration_leaves_no_folder(program, tmp_path, option):
    """The schedule of the stand-in warms up over 10 steps; a run of 9 is too short."""
    run = Run(program, tmp_path / "runs", option)
    result = run.start()
    assert result.code == 2, result.output
    assert sorted(path.name for path in run.folder.parent.iterdir()) == ["run.yaml"]


@pytest.mark.parametrize(
    "option",
    ["--trainer.max_time=soon", "--trainer.num_nodes=2", "--trainer.profiler=x", "--trainer.strategy=ddp"],
)
def test_a_run_that_goes_on_is_checked_before_it_says_so(program, tmp_path, option):
    run = Run(program, tmp_path / "runs")
    assert run.start("--trainer.max_steps=3").code == 0
    before = (run.folder / "config.yaml").read_text()
    result = run.start(option)
    assert result.code == 2
    assert "goes on after" not in result.output
    assert "changed since" not in result.output
    assert result.output.splitlines()[-1].startswith("error: trainer")
    assert (run.folder / "config.yaml").read_text() == before


def test_a_url_is_no_folder(program, tmp_path):
    run = Run(program, tmp_path / "runs")
    (tmp_path / "config.json").write_text("{}")  # so that the folder passes for a MODEL
    for args, key in (
        ((*run.args, "--trainer.default_root_dir=s3://bucket/runs"), "trainer.default_root_dir"),
        ((*run.args, "--ckpt_path=s3://bucket/runs"), "--ckpt_path"),
        (("export", "gs://bucket/model", "--output", tmp_path / "out"), "model"),
        (("export", tmp_path, "--output", "s3://bucket/out"), "--output"),
        (("generate", tmp_path, "--prompts", "https://host/x.jsonl", "--output", "x"), "--prompts"),
    ):
        result = program.run(*args)
        assert result.code == 2
        *_, line = result.output.splitlines()
        assert line.startswith(f"error: {key}: ")
        assert "is a URL" in line
    assert not (ROOT / "s3:").exists()


def test_runs_lists_and_compares(program, tmp_path):
    run = Run(program, tmp_path / "runs", "--checkpoint.keep_best=1")
    assert run.start("--name=" + "long" * 30, "--trainer.max_steps=4").code == 0
    assert run.start("--name=other", "--model.init_args.rate=0.5").code == 0
    (tmp_path / "runs" / "no_run").mkdir()
    other, long = (tmp_path / "runs" / name for name in ("other", "long" * 30))
    result = program.run("runs", tmp_path / "runs")
    assert result.code == 0, result.output
    lines = result.output.splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= 100
    about = json.loads((other / "checkpoints" / f"step={STEPS:08d}" / "checkpoint.json").read_text())
    row = next(line for line in lines if line.startswith("other"))
    assert re.search(rf"finished +{STEPS} of {STEPS} +{about['metrics']['validation/loss']:.4f} ", row)
    (other / "checkpoints" / f"step={STEPS:08d}" / "meta.pt").unlink()
    assert re.search(r"^other +damaged", program.run("runs", tmp_path / "runs").output, re.MULTILINE)
    result = program.run("runs", long, other)
    assert result.code == 0, result.output
    assert "model.init_args.rate: 0.01 -> 0.5" in result.output.splitlines()
    assert "trainer.max_steps: 4 -> -1" in result.output.splitlines()
    assert program.run("runs", tmp_path / "nowhere").code == 2
    for text in (b"a: [", b"\xff\xfe"):
        (long / "config.yaml").write_bytes(text)
        assert len(program.run("runs", tmp_path / "runs").output.splitlines()) == 3
        for pair in ((long, other), (other, long)):
            result = program.run("runs", *pair)
            assert result.code == 2
            assert result.output.startswith(f"error: {long / 'config.yaml'} is not readable as YAML")


@pytest.mark.parametrize(("size", "named"), [(4000, "run"), (8000, "step=00000006")])
def test_a_full_disk_is_one_line_and_loses_nothing(program, whole, tmp_path, size, named):  # noqa: F811
    """From step 4 on, curves and checkpoints (of which torch makes an error of its own) cannot be written."""
    run = Run(program, tmp_path / "runs")
    small = f"--trainer.callbacks=[{{class_path: tests.app.standin.SmallDisk, init_args: {{size: {size}, step: 4}}}}]"
    result = run.start(small)
    assert result.code == 2, result.output
    assert "Traceback" not in result.output
    lines = result.output.splitlines()
    assert [line for line in lines if "error" in line.lower()] == lines[-1:]
    assert f"{named}: File too large; make room, then start the same command again" in lines[-1]
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["step=00000003"]
    assert run.start("--trainer.callbacks=null").code == 0
    same_checkpoint(run.last, whole.last)
    assert_curves_whole(run.folder)
