"""A killed run goes on as if nothing had happened: bit for bit, with no gap and no overlap in its curves.

The default suite kills a few times; SUPERBOLT_KILLS=20 (the most) asks for more.
"""

import os
import random
import re
import signal
from pathlib import Path

import pytest

from tests.app.helpers import RUN_FILE, Program, kill_when, losses, same_checkpoint, scalars

KILLS = min(20, int(os.environ.get("SUPERBOLT_KILLS", "4")))
STEPS = 24


class Run:
    """A run of the stand-in model in a folder of its own."""

    def __init__(self, program: Program, folder: Path, *options: str):
        folder.mkdir(parents=True)
        self.program, self.folder, self.losses = program, folder / "run", folder / "losses.txt"
        file = folder / "run.yaml"
        file.write_text(RUN_FILE, encoding="utf-8")
        self.args = [
            "fit",
            f"--config={file}",
            f"--trainer.default_root_dir={folder}",
            f"--data.init_args.steps={STEPS}",
            f"--model.init_args.loss_file={self.losses}",
            *options,
        ]

    def start(self, *options: str, **kwargs):
        return self.program.run(*self.args, *options, **kwargs)

    @property
    def last(self) -> Path:
        return self.folder / "checkpoints" / f"step={STEPS:08d}"

    def steps_done(self) -> int:
        return max(losses(self.losses), default=0)


def assert_curves_whole(folder: Path) -> None:
    curves = scalars(folder)
    assert curves["training/loss"] == list(range(1, STEPS + 1))
    assert curves["validation/loss"] == [*range(0, STEPS + 1, 4)]
    assert curves["training/tokens_per_second"] == [*range(4, STEPS + 1, 4)]


@pytest.fixture(scope="module")
def whole(program, tmp_path_factory):
    """The uninterrupted run."""
    run = Run(program, tmp_path_factory.mktemp("whole") / "runs")
    result = run.start()
    assert result.code == 0, result.output
    assert_curves_whole(run.folder)
    return run


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_run_equals_the_uninterrupted_one(program, whole, tmp_path, workers):
    run = Run(program, tmp_path / "runs", f"--data.init_args.num_workers={workers}")
    chance = random.Random(workers)
    for _ in range(KILLS):
        # A kill comes at a random moment of start-up, or of a step, validation or save some steps further on.
        target = run.steps_done() + chance.randrange(1, max(2, STEPS // KILLS))
        if chance.random() < 0.2:
            kill = kill_when(lambda: True, delay=0.6 * chance.random())
        else:
            kill = kill_when(lambda target=target: run.steps_done() >= target, delay=0.02 * chance.random())
        result = run.start(meanwhile=kill)
        assert result.code == -signal.SIGKILL, result.output
    result = run.start()
    assert result.code == 0, result.output
    assert all(len(values) == 1 for values in losses(run.losses).values()), "a step was computed differently"
    assert losses(run.losses) == losses(whole.losses)
    same_checkpoint(run.last, whole.last)
    assert_curves_whole(run.folder)
    assert not list((run.folder / "checkpoints").glob("*.partial"))


def test_finished_run_has_nothing_to_do(whole):
    """The lock alone is written: it names who looks at the run."""
    files = [path for path in whole.folder.rglob("*") if path.is_file() and path.name != "lock"]
    before = [path.stat().st_mtime_ns for path in files]
    result = whole.start()
    assert result.code == 0
    assert "is finished: 24 steps" in result.unfolded
    assert "validation/loss" in result.output
    assert "device" not in result.output, "nothing must be built"
    assert [path for path in whole.folder.rglob("*") if path.is_file() and path.name != "lock"] == files
    assert [path.stat().st_mtime_ns for path in files] == before


def test_changed_configuration_is_shown_and_wins(program, tmp_path):
    run = Run(program, tmp_path / "runs")
    assert run.start("--trainer.max_steps=6").code == 0
    result = run.start("--trainer.max_steps=9", "--model.init_args.decay=0.5", "--model.init_args.rate=0.5")
    assert result.code == 0, result.output
    assert "goes on after step 6 of 9" in result.unfolded
    assert "not resumable" not in result.output, "Lightning knows nothing of how a run is resumed"
    assert "  trainer.max_steps: 6 -> 9" in result.output
    assert "  model.init_args.decay: 0.1 -> 0.5" in result.output
    assert "lr 4.5e-01" in result.output, "the new rate times what the schedule says at step 9 of a warm-up of 10"
    assert "decay: 0.5" in (run.folder / "config.yaml").read_text()
    assert scalars(run.folder)["training/loss"] == list(range(1, 10))


def test_longer_run_equals_one_that_was_long_from_the_start(program, whole, tmp_path):
    run = Run(program, tmp_path / "runs")
    assert run.start("--trainer.max_steps=7").code == 0
    assert run.start().code == 0
    assert losses(run.losses) == losses(whole.losses)
    assert scalars(run.folder)["training/loss"] == list(range(1, STEPS + 1))


def test_signal_saves_and_exits_as_a_program_that_was_ended(program, whole, tmp_path):
    run = Run(program, tmp_path / "runs")
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)):
        target = run.steps_done() + 5
        result = run.start(meanwhile=kill_when(lambda target=target: run.steps_done() >= target, number=number))
        assert result.code == code, result.output
        assert f"stopped by {number.name} at step {run.steps_done()}" in result.output
        assert "Traceback" not in result.output
        assert (run.folder / "checkpoints" / f"step={run.steps_done():08d}").is_dir()
    assert run.start().code == 0
    same_checkpoint(run.last, whole.last)
    assert_curves_whole(run.folder)


def test_damaged_checkpoint_is_passed_over(program, whole, tmp_path):
    run = Run(program, tmp_path / "runs")
    assert run.start("--trainer.max_steps=6").code == 0
    content = (run.folder / "checkpoints" / "step=00000006" / "__0_0.distcp").read_bytes()
    flipped = bytes([*content[:200], content[200] ^ 1, *content[201:]])
    (run.folder / "checkpoints" / "step=00000006" / "__0_0.distcp").write_bytes(flipped)
    (run.folder / "checkpoints" / "step=00000009.partial").mkdir()
    result = run.start()
    assert result.code == 0, result.output
    assert "step=00000006 is damaged and passed over: __0_0.distcp has changed" in result.unfolded
    assert "goes on after step 3" in result.unfolded
    same_checkpoint(run.last, whole.last)


def test_checkpoint_of_another_architecture_is_refused(program, tmp_path):
    run = Run(program, tmp_path / "runs")
    assert run.start("--trainer.max_steps=3").code == 0
    for option, difference in (
        (
            "--model.init_args.width=8",
            "6 of another shape (network.backbone.embeddings.weight: [16, 16] there, [16, 8] here)",
        ),
        ("--model.init_args.extra=true", "3 missing there (network.backbone.layers.1.mixer.down_proj.weight)"),
    ):
        result = run.start(option)
        assert result.code == 2
        assert difference in result.output
        assert result.output.splitlines()[-1].startswith("error: ")
        assert "--name" in result.output.splitlines()[-1]


def test_validate_and_test_read_the_newest_checkpoint(whole):
    final = scalars(whole.folder, values=True)["validation/loss"][-1]
    for command in ("validate", "test"):
        result = whole.program.run(command, *whole.args[1:])
        assert result.code == 0, result.output
        name = "validation" if command == "validate" else command
        assert f"step={STEPS:08d}: {name} after step {STEPS}: loss {final:.4f}" in result.unfolded
    older = sorted((whole.folder / "checkpoints").iterdir())[0]
    result = whole.program.run("validate", *whole.args[1:], "--ckpt_path", older)
    assert result.code == 0, result.output
    assert f"{older}: validation after step 21" in result.output
    assert f"loss {final:.4f}" not in result.output


def test_a_request_to_stop_ends_a_step_and_the_run_goes_on_later(program, whole, tmp_path):
    """As Lightning's time limit does, or a callback of the user: here in the middle of step 6."""
    run = Run(program, tmp_path / "runs")
    result = run.start("--trainer.callbacks=[{class_path: tests.app.standin.Stop, init_args: {step: 5}}]")
    assert result.code == 0, result.output
    assert re.search(rf"step 6: 384 tokens in \d+s, stopped before step {STEPS}; the same command", result.output)
    assert (run.folder / "checkpoints" / "step=00000006").is_dir()
    result = run.start()
    assert result.code == 0, result.output
    assert "s, finished" in result.output
    assert losses(run.losses) == losses(whole.losses)
