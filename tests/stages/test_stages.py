"""What SFT, RL and QAD will be made of: a stage and its data are short files that plug in, on one process and on two.

Each stage here stands in a file of its own and knows the public pieces only: the window, a batch with fields of its
own, the head, a metric, a lent head. The run is one of the program, with checkpoints, on windows that vary in size.
"""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.app.helpers import ROOT, Program, load_tensors, same_checkpoint, scalars

STEPS = 8
RUN_FILE = """\
name: run
model:
  class_path: {stage}
  init_args:
    backbone: {{vocab_size: 16, hidden_size: 16, hybrid_override_pattern: "-*-", intermediate_size: 32,
      num_attention_heads: 2, num_key_value_heads: 1, head_dim: 8, initializer_range: 0.3}}
    precision: {{recipe: fp32}}
    optimizer: {{learning_rate: 1.0e-2, epsilon: 1.0e-4}}
    schedule: {{decay_tokens: 400}}
data: {{class_path: tests.stages.data.VaryingWindows, init_args: {{steps: 8}}}}
trainer: {{accelerator: cpu, devices: 1}}
console: {{every_n_steps: 2}}
checkpoint: {{every_n_steps: 3}}
"""
STAGES = {"distillation.Distillation": "training/reverse_kl", "clipped_ratio.ClippedRatio": "training/clipped"}


def fit(program: Program, stage: str, folder: Path, *options: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(RUN_FILE.format(stage=f"tests.stages.{stage}"), encoding="utf-8")
    arguments = ["fit", f"--config={file}", f"--trainer.default_root_dir={folder}", *options]
    if "--trainer.devices=2" in options:  # Lightning starts the second process by the command of the first
        done = subprocess.run([sys.executable, "-m", "app", *arguments], cwd=ROOT, capture_output=True, text=True)
        code, output = done.returncode, done.stdout + done.stderr
    else:
        result = program.run(*arguments)
        code, output = result.code, result.output
    assert code == 0, output
    assert "mock step   2 rows of 32 random tokens" in output
    return folder / "run"


@pytest.mark.parametrize("file", ["distillation", "clipped_ratio", "data"])
def test_it_takes_at_most_sixty_lines(file: str) -> None:
    assert len((Path(__file__).parent / f"{file}.py").read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.parametrize(("stage", "metric"), STAGES.items())
def test_a_stage_trains_on_windows_of_any_size_on_one_process_and_on_two(
    program, stage: str, metric: str, tmp_path
) -> None:
    folders = [tmp_path / name for name in ("one", "two", "resumed")]
    for folder in folders:
        folder.mkdir()
    one, two = fit(program, stage, folders[0]), fit(program, stage, folders[1], "--trainer.devices=2")
    fit(program, stage, folders[2], "--trainer.max_steps=4")
    resumed = fit(program, stage, folders[2])
    last = f"checkpoints/step={STEPS:08d}"
    same_checkpoint(resumed / last, one / last)
    assert not any("teacher" in name for name in load_tensors(one / last))
    alone, both = scalars(one, values=True), scalars(two, values=True)
    own = {metric, "training/loss", "training/gradient_norm", "training/learning_rate"}
    own |= {name for name in alone if name.startswith("training/largest_")}
    assert len(own) == 5
    for name in own:
        assert both[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6), name
        assert len(alone[name]) == STEPS
    assert all(math.isfinite(value) and value > 0 for value in alone["training/gradient_norm"])


def test_progress_and_schedule_count_tokens_where_windows_vary(program, tmp_path) -> None:
    run = fit(program, "clipped_ratio.ClippedRatio", tmp_path)
    rows, lengths = [4, 8, 12, 4, 8, 12, 4, 8], [8, 16, 24, 32, 8, 16, 24, 32]
    tokens = sum(row * length for row, length in zip(rows, lengths, strict=True))
    meta = torch.load(run / f"checkpoints/step={STEPS:08d}" / "meta.pt", weights_only=True)
    assert meta["VaryingWindows"]["progress"] == {"steps": STEPS, "tokens": tokens, "samples": sum(rows)}
    rates = scalars(run, values=True)["training/learning_rate"]
    for step in (1, STEPS - 1, STEPS):  # minus-sqrt over the last 400 tokens
        left = tokens - sum(row * length for row, length in zip(rows[:step], lengths[:step], strict=True))
        factor = 0.01 + 0.99 * (1 - math.sqrt(max(0, 400 - left) / 400))
        assert rates[step - 1] == pytest.approx(1e-2 * factor)
