"""Runs that train adapters, through the real program: killed and resumed, on two processes, used, refused."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modules.checkpoints.adapted import AdaptedSource
from modules.checkpoints.source import open_model
from tests.app.helpers import ROOT, Program, kill_when, load_tensors, same_checkpoint
from tests.app.test_real_run import make_run_file, start
from tests.modules.helpers import assert_close

STEPS = 6


@pytest.fixture(scope="module")
def run_file(tmp_path_factory) -> Path:
    return make_run_file(tmp_path_factory.mktemp("corpus"), STEPS)


@pytest.fixture(scope="module")
def base(program: Program, run_file, tmp_path_factory) -> Path:
    """A trained model."""
    folder = tmp_path_factory.mktemp("base")
    result = start(program, run_file, folder)
    assert result.code == 0, result.output
    return folder / "run"


def options(base: Path, dropout: float = 0.2) -> list[str]:
    lora = f'{{rank: 2, alpha: 4, dropout: {dropout}, patterns: ["*_proj"]}}'
    return [f"--model.init_args.init_from={base}", f"--model.init_args.lora={lora}", "--data.init_args.seed=1"]


@pytest.fixture(scope="module")
def adapted(program: Program, run_file, base, tmp_path_factory) -> Path:
    """A run over it that nothing interrupts."""
    folder = tmp_path_factory.mktemp("adapted")
    result = start(program, run_file, folder, *options(base))
    assert result.code == 0, result.output
    assert re.search(
        r"adapters +adapted: layers with \d\d\.\d% of the network's [\d,]+ weights, all frozen", result.output
    )
    return folder / "run"


def last(run: Path) -> Path:
    return run / "checkpoints" / f"step={STEPS:08d}"


def test_checkpoints_hold_adapters_alone(base, adapted):
    tensors = load_tensors(last(adapted))
    model = {name for name in tensors if name.startswith("model.network.")}
    assert model
    assert all(name.endswith((".adapter.A", ".adapter.B")) for name in model)
    state = {name for name in tensors if name.startswith("optimizer.")}
    moments = {name.replace("model.", "optimizer.", 1) + end for name in model for end in (".exp_avg", ".exp_avg_sq")}
    assert moments <= state
    assert all(".adapter." in name for name in state)
    assert any(tensor.any() for name, tensor in tensors.items() if name.endswith(".B"))


def test_a_killed_run_equals_the_uninterrupted_one(program, run_file, base, adapted, tmp_path):
    """With dropout: it is drawn by step, rank and layer."""
    saved = tmp_path / "run" / "checkpoints" / "step=00000002"
    result = start(program, run_file, tmp_path, *options(base), meanwhile=kill_when(saved.exists, delay=0.01))
    assert result.code == -signal.SIGKILL, result.output
    result = start(program, run_file, tmp_path, *options(base))
    assert result.code == 0, result.output
    assert "goes on after step" in result.unfolded
    same_checkpoint(last(tmp_path / "run"), last(adapted))


def test_another_base_is_refused(program, run_file, base, adapted, tmp_path):
    merged = tmp_path / "merged"
    assert program.run("export", adapted, f"--output={merged}").code == 0
    result = start(program, run_file, adapted.parent, *options(merged), "--trainer.max_steps=5")
    assert result.code == 2
    result = start(program, run_file, adapted.parent, *options(merged), "--model.init_args.max_skipped_steps=9")
    assert result.code == 2, result.output
    assert "is not the base that the adapters in" in result.unfolded
    assert "Traceback" not in result.output


def test_two_processes_train_what_one_does(run_file, base, tmp_path):
    plain = [f"--config={run_file}", f"--trainer.default_root_dir={tmp_path}", "--data.init_args.micro_batch_size=1"]
    plain += ["--model.init_args.precision.recipe=fp32", "--trainer.max_steps=2", "--samples.max_new_tokens=0"]
    for devices in (1, 2):
        command = ["fit", *plain, *options(base, 0.0), f"--trainer.devices={devices}", f"--name={devices}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [sys.executable, "-m", "app", *command],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
    one, two = (load_tensors(tmp_path / str(devices) / "checkpoints" / "step=00000002") for devices in (1, 2))
    for name in one:
        if name.endswith((".A", ".B")):
            assert_close(two[name], one[name], 1e-3, name)


def test_it_is_a_model(program, run_file, base, adapted, tmp_path):
    """Commands take it: what it writes is what the merged export writes."""
    merged, texts = tmp_path / "merged", []
    assert program.run("export", adapted, f"--output={merged}").code == 0
    for model in (adapted, merged):
        result = program.run("score", model, f"--data={run_file.parent / 'corpus'}")
        assert result.code == 0, result.output
        texts.append(re.search(r"mean nll (\d+\.\d+)", result.unfolded)[1])  # type: ignore[index]
    assert float(texts[0]) == pytest.approx(float(texts[1]), abs=2e-4)
    exported = open_model(merged)
    source = open_model(adapted)
    assert isinstance(source, AdaptedSource)
    assert all(torch.equal(exported.read(name), source.read(name)) for name in source.tensors)
    result = program.run("export", adapted, f"--output={tmp_path / 'peft'}", "--format=peft")
    assert result.code == 0, result.output
    assert (tmp_path / "peft" / "adapter_config.json").exists()
    assert (tmp_path / "peft" / "adapter_model.safetensors").exists()
    result = program.run("export", base, f"--output={tmp_path / 'none'}", "--format=peft")
    assert result.code == 2
    assert "is a whole model, no adapters" in result.unfolded


def test_mistakes(program, run_file, base, tmp_path):
    result = start(program, run_file, tmp_path, "--model.init_args.lora={rank: 2}")
    assert result.code == 2
    assert "name its MODEL in model.init_args.init_from" in result.unfolded
    result = start(program, run_file, tmp_path, *options(base), '--model.init_args.lora={patterns: ["*.query_proj"]}')
    assert result.code == 2
    assert "'*.query_proj' matches no layer" in result.unfolded
    assert not (tmp_path / "run").exists(), "nothing was begun"
