"""A run meets bad text, and one that asks for too much memory: what the user sees, and what is left behind."""

import re
import signal
from pathlib import Path

import pytest
import torch

from tests.app.helpers import Program, kill_when, same_checkpoint, scalars
from tests.app.test_main import python
from tests.app.test_real_run import make_run_file, start

STEPS = 18
BAD = 16
GUARD = "    bad_steps: [16]\n    spike_guard: {sigmas: 3.0, window: 8, minimum_steps: 4}\n"


@pytest.fixture(scope="module")
def run_file(tmp_path_factory) -> Path:
    file = make_run_file(tmp_path_factory.mktemp("corpus"), STEPS)
    text = file.read_text(encoding="utf-8")
    text = text.replace("class_path: modules.pretraining.Pretraining", "class_path: tests.app.spiking.BadText")
    text = text.replace("    spike_guard: {sigmas: 6.0}\n", GUARD)
    text = re.sub(r"(validation|checkpoint): \{every_n_steps: \d+\}", r"\1: {every_n_steps: 6}", text)
    file.write_text(re.sub(r"samples: .*", "samples: {max_new_tokens: 0}", text), encoding="utf-8")
    return file


def last(folder: Path) -> Path:
    return folder / "run" / "checkpoints" / f"step={STEPS:08d}"


@pytest.fixture(scope="module")
def whole(program: Program, run_file: Path, tmp_path_factory) -> Path:
    """The uninterrupted run, without a mock step."""
    folder = tmp_path_factory.mktemp("whole")
    result = start(program, run_file, folder, "--mock_step.enabled=false")
    assert result.code == 0, result.output
    assert "mock step" not in result.output
    file = folder / "run" / "spikes" / f"step={BAD:08d}.pt"
    lines = result.output.splitlines()
    (place,) = [number for number, line in enumerate(lines) if " skipped, " in line]
    assert re.fullmatch(
        rf"step {BAD} skipped, loss spike: loss [\d.]+ \(\+[\d.]+ sigma\), gradient norm [\d.]+ \([+-][\d.]+ sigma\)",
        lines[place],
    )
    assert lines[place + 1] == f"  its batch: {file}"
    return folder


def test_the_batch_of_a_spike_is_there_to_look_at(whole: Path) -> None:
    (file,) = (whole / "run" / "spikes").iterdir()
    saved = torch.load(file, weights_only=True)
    assert (saved["step"], saved["rank"], saved["reason"]) == (BAD, 0, "loss_spike")
    assert len(saved["micro_batches"]) == 2
    for index, batch in enumerate(saved["micro_batches"]):
        assert set(batch["labels"].unique().tolist()) <= {-100, 7}, "the bad text itself"
        assert batch["tokens"].shape == batch["document_ids"].shape == (2, 64)
        expected = torch.randint(290, (2, 64), generator=torch.Generator().manual_seed(2 * (BAD - 1) + index))
        assert torch.equal(batch["tokens"], expected)
    values = scalars(whole / "run", values=True)
    losses = torch.cat([batch["token_losses"].flatten() for batch in saved["micro_batches"]])
    targets = sum(int((batch["labels"] >= 0).sum()) for batch in saved["micro_batches"])
    next_token = values["training/next_token_loss"][BAD - 1]
    assert float(losses.double().sum()) / targets == pytest.approx(next_token, rel=1e-5), "those of the step itself"
    assert saved["loss"] == values["training/loss"][BAD - 1]
    assert saved["gradient_norm"] == values["training/gradient_norm"][BAD - 1]


def test_the_curves_count_the_spike(whole: Path) -> None:
    values = scalars(whole / "run", values=True)
    counted = [0.0] * (BAD - 1) + [1.0] * (STEPS - BAD + 1)
    assert values["training/skipped_steps"] == values["training/skipped_loss_spikes"] == counted
    assert set(values["training/skipped_not_finite"] + values["training/skipped_gradient_spikes"]) == {0.0}
    above = [step for step, sigmas in enumerate(values["training/loss_sigmas"], 1) if sigmas > 3]
    assert above == [BAD]


def test_a_killed_run_skips_the_same_steps_and_a_mock_step_changes_nothing(program, run_file, whole, tmp_path) -> None:
    """The window is filled before the kill, the spike comes after it; `whole` had no mock step, here there are two."""
    saved = tmp_path / "run" / "checkpoints" / "step=00000012"
    result = start(program, run_file, tmp_path, meanwhile=kill_when(saved.is_dir))
    assert result.code == -signal.SIGKILL, result.output
    result = start(program, run_file, tmp_path)
    assert result.code == 0, result.output
    assert re.search(r"^mock step   2 rows of 64 random tokens: [\d.]+ s, peak memory", result.output, re.MULTILINE)
    same_checkpoint(last(tmp_path), last(whole))
    ours, theirs = (scalars(folder / "run", values=True) for folder in (tmp_path, whole))
    for name in ("training/loss", "training/skipped_loss_spikes", "training/loss_sigmas", "training/gradient_sigmas"):
        assert ours[name] == theirs[name], name
    assert (tmp_path / "run" / "spikes" / f"step={BAD:08d}.pt").is_file()


def test_a_level_that_stays_high_stops_the_run_and_says_how_to_go_on(program, run_file, tmp_path) -> None:
    options = ["--model.init_args.bad_steps=[15,16,17,18]", "--model.init_args.max_skipped_steps=3"]
    result = start(program, run_file, tmp_path, *options)
    assert result.code == 2, result.output
    *_, before, _, message = result.output.splitlines()
    assert before.startswith("step 17 skipped, loss spike")
    assert message.startswith(
        "error: nothing but skipped steps in steps 15 to 17 (model.init_args.max_skipped_steps 3): 3 loss "
    )
    assert "raise model.init_args.spike_guard.sigmas or set model.init_args.spike_guard to null" in message
    result = start(program, run_file, tmp_path, *options, "--model.spike_guard=null")
    assert result.code == 0, result.output
    assert "goes on after step 12" in result.output


@pytest.mark.slow
def test_two_processes_decide_alike_and_keep_their_own_batches(run_file, tmp_path) -> None:
    outputs = {}
    for name, *options in (
        ("with", f"--trainer.max_steps={BAD}", "--checkpoint.keep_last=3"),
        ("without", "--trainer.max_steps=6", "--mock_step.enabled=false"),
    ):
        common = ["-m", "app", "fit", f"--config={run_file}", f"--trainer.default_root_dir={tmp_path / name}"]
        layout = ["--trainer.devices=2", "--data.init_args.micro_batch_size=1"]
        result = python(*common, *layout, *options)
        assert result.returncode == 0, result.stderr
        outputs[name] = result.stdout
    assert [output.count("mock step") for output in outputs.values()] == [1, 0]
    same_checkpoint(*(tmp_path / name / "run" / "checkpoints" / "step=00000006" for name in outputs))
    assert outputs["with"].count(" skipped, ") == 1
    assert f"run/spikes/step={BAD:08d}-rank=*.pt" in outputs["with"]
    saved = [
        torch.load(tmp_path / "with" / "run" / "spikes" / f"step={BAD:08d}-rank={rank}.pt", weights_only=True)
        for rank in (0, 1)
    ]
    assert [content["rank"] for content in saved] == [0, 1]
    assert saved[0]["loss"] == saved[1]["loss"]
    for rank, content in enumerate(saved):
        for index, batch in enumerate(content["micro_batches"]):
            generator = torch.Generator().manual_seed(2 * (BAD - 1) + index + 100 * rank)
            assert torch.equal(batch["tokens"], torch.randint(290, (1, 64), generator=generator)), "each has its own"


def test_a_lack_of_memory_shows_before_the_first_step(run_file, tmp_path) -> None:
    """A limit on the process's memory stands in for a small machine."""
    code = (
        "import re, resource, sys, app.cli; from app.__main__ import main; "
        "used = int(re.search(r'VmSize:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024; "
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30)); sys.exit(main())"
    )
    rows = "--data.init_args.micro_batch_size=16384", "--data.init_args.global_batch_size=16384"
    result = python("-c", code, "fit", f"--config={run_file}", f"--trainer.default_root_dir={tmp_path}", *rows)
    assert result.returncode == 2, result.stderr
    assert "validation after step" not in result.stdout
    assert result.stderr.splitlines()[-1] == (
        "error: out of memory: a step with 16384 rows of 64 tokens at a time does not fit on 1 x cpu; lower data."
        "init_args.micro_batch_size (now 16384; the result stays the same) or set model.init_args."
        "activation_checkpointing: true"
    )
    assert "Traceback" not in result.stderr
