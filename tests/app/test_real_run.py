"""The real model on a real corpus through the real program: killed, resumed, evaluated."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from app.tensorboard.layout import LAYOUT
from datamodules.text.preparation import Preparation, prepare_corpus
from modules.checkpoints import folder
from tests.app.helpers import ROOT, Program, kill_when, load_tensors, same_checkpoint, scalars

STEPS = 9
STORED = Path(__file__).parent / "stored"
RUN_FILE = """\
name: run
model:
  class_path: modules.pretraining.Pretraining
  init_args:
    backbone:
      vocab_size: {vocab_size}
      hidden_size: 32
      hybrid_override_pattern: "ME*-"
      num_attention_heads: 2
      num_key_value_heads: 1
      head_dim: 16
      intermediate_size: 64
      mamba_num_heads: 2
      mamba_head_dim: 32
      ssm_state_size: 16
      n_groups: 1
      chunk_size: 16
      n_routed_experts: 4
      num_experts_per_tok: 2
      moe_intermediate_size: 32
      moe_latent_size: 16
      moe_shared_expert_intermediate_size: 32
      num_nextn_predict_layers: 1
    mtp_depths: 2
    spike_guard: {{sigmas: 6.0}}
    precision: {{recipe: super}}
    optimizer: {{learning_rate: 3.0e-3}}
    schedule: {{warmup_tokens: 512, decay_tokens: 1024}}
data:
  class_path: datamodules.pretraining.PretrainingData
  init_args:
    path: {corpus}
    sequence_length: 64
    global_batch_size: 4
    micro_batch_size: 2
    total_tokens: {total_tokens}
    validation_rows: 4
trainer: {{accelerator: cpu, devices: 1}}
console: {{every_n_steps: 3}}
validation: {{every_n_steps: 3}}
samples: {{prompts: 1, prompt_tokens: 4, max_new_tokens: 4}}
checkpoint: {{every_n_steps: 2}}
"""


def make_run_file(folder: Path, steps: int = STEPS) -> Path:
    """Prepare a corpus in a folder and write a run file for it."""
    chance = random.Random(0)
    (folder / "texts").mkdir()
    for number in range(60):
        lines = [f"value_{chance.randrange(9)} = {chance.randrange(99)}  # note {number}" for _ in range(20)]
        (folder / "texts" / f"{number}.py").write_text("\n".join(lines) + "\n")
    options = Preparation(
        paths=[str(folder / "texts")],
        output=folder / "corpus",
        sequence_length=64,
        vocab_size=600,
        validation_fraction=0.2,
        workers=1,
    )
    prepare_corpus(options)
    file = folder / "run.yaml"
    text = RUN_FILE.format(vocab_size=600, corpus=folder / "corpus", total_tokens=steps * 4 * 64)
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def run_file(tmp_path_factory) -> Path:
    return make_run_file(tmp_path_factory.mktemp("corpus"))


def start(program: Program, run_file: Path, folder: Path, *options: str, **kwargs):
    return program.run("fit", f"--config={run_file}", f"--trainer.default_root_dir={folder}", *options, **kwargs)


@pytest.fixture(scope="module")
def whole(program, run_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    result = start(program, run_file, folder)
    assert result.code == 0, result.output
    assert "gzip -9 needs" in result.output
    assert "--- sample 1 of 1: prompt ⟦what the model writes⟧" in result.output
    assert re.search(r"precision   \* +nvfp4  nvfp4  nvfp4  emulated +\d+ +\d+\.\d%", result.output)
    return folder / "run"


def test_a_run_without_the_mock_step_is_the_same_run(program, run_file, whole, tmp_path):
    """Samples are then the first to gather the weights of the MTP block."""
    result = start(program, run_file, tmp_path, "--mock_step.enabled=false")
    assert result.code == 0, result.output
    assert "mock step" not in result.output
    last = f"checkpoints/step={STEPS:08d}"
    same_checkpoint(tmp_path / "run" / last, whole / last)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_pretraining_equals_the_uninterrupted_one(program, run_file, whole, tmp_path, workers):
    options = f"--data.init_args.workers={workers}"
    run = tmp_path / "run"
    for step in (4,) if workers else (4, 6):
        saved = run / "checkpoints" / f"step={step:08d}"
        result = start(program, run_file, tmp_path, options, meanwhile=kill_when(saved.is_dir))
        assert result.code == -signal.SIGKILL, result.output
    result = start(program, run_file, tmp_path, options)
    assert result.code == 0, result.output
    last = f"checkpoints/step={STEPS:08d}"
    same_checkpoint(run / last, whole / last)
    ours, theirs = scalars(run, values=True), scalars(whole, values=True)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        if not name.startswith(("speed/", "memory/", "training/tokens_per_second", "data/")):
            assert ours[name] == theirs[name], name
    steps = scalars(run)
    assert steps["training/loss"] == list(range(1, STEPS + 1))
    assert steps["validation/bits_per_byte"] == [0, 3, 6, 9]


def test_a_checkpoint_in_micro_batches_goes_on_at_its_step(program, run_file, whole, tmp_path):
    """As those up to 4f1aead: Lightning's batch was a micro-batch, and the loader saved its own state.

    `meta_4f1aead.pt` is that of step 4 of this very run file; the numbers in it that depend on the machine are new.
    """
    assert start(program, run_file, tmp_path, "--trainer.max_steps=4").code == 0
    saved = tmp_path / "run" / "checkpoints" / "step=00000004"
    old, new = (torch.load(file, weights_only=True) for file in (STORED / "meta_4f1aead.pt", saved / "meta.pt"))
    assert old["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] == 8
    old |= {name: new[name] for name in ("random_state", "step_guard")}
    partial = folder.begin(saved)
    shutil.copytree(saved, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns(folder.MANIFEST))
    torch.save(old, partial / "meta.pt")
    folder.publish(saved, folder.describe(saved))
    result = start(program, run_file, tmp_path)
    assert result.code == 0, result.output
    assert f"goes on after step 4 of {STEPS}" in result.unfolded
    ours, theirs = (load_tensors(run / "checkpoints" / f"step={STEPS:08d}") for run in (tmp_path / "run", whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert scalars(tmp_path / "run")["training/loss"] == list(range(1, STEPS + 1))


def test_a_checkpoint_stands_alone(whole):
    """Configuration, tokenizer and what the checkpoint is are inside it."""
    (newest, *_) = sorted((whole / "checkpoints").iterdir(), reverse=True)
    about = json.loads((newest / "checkpoint.json").read_text())
    assert (about["step"], about["last_step"], about["finished"]) == (STEPS, STEPS, True)
    assert about["tokens"] == STEPS * 4 * 64
    assert set(about["metrics"]) == {"validation/loss", "validation/bits_per_byte"}
    assert (newest / "config.yaml").read_text() == (whole / "config.yaml").read_text()
    assert (newest / "tokenizer" / "tokenizer.json").is_file()
    text = (newest / "config.yaml").read_text()
    assert "layer_norm_epsilon" in text, "defaults are written out"


def test_a_run_starts_from_another_and_goes_on_without_it(program, run_file, whole, tmp_path):
    """Its first validation is the other's last; once it has a checkpoint, the other may be gone."""
    model = tmp_path / "model"
    shutil.copytree(whole, model)
    options = (f"--model.init_args.init_from={model}", "--model.init_args.seed=3")
    result = start(program, run_file, tmp_path, *options, "--trainer.max_steps=2")
    assert result.code == 0, result.output
    assert f"weights {model}/checkpoints/step={STEPS:08d}" in re.sub(r"\s+", " ", result.output)
    metrics = json.loads((whole / "checkpoints" / f"step={STEPS:08d}" / "checkpoint.json").read_text())["metrics"]
    bits = scalars(tmp_path / "run", values=True)["validation/bits_per_byte"][0]
    assert bits == pytest.approx(metrics["validation/bits_per_byte"], rel=1e-6)
    shutil.rmtree(model)
    result = start(program, run_file, tmp_path, *options, "--trainer.max_steps=4")
    assert result.code == 0, result.output
    assert "goes on after step 2" in result.unfolded
    assert "weights  " not in result.output


def test_every_chart_of_the_dashboard_finds_its_curves(whole):
    tags = scalars(whole)
    charts = [chart for charts in LAYOUT.values() for chart in charts]
    missing = {chart.title for chart in charts if not any(re.fullmatch(chart.curves, tag) for tag in tags)}
    assert missing == {
        "MFU",
        *(chart.title for chart in charts if "problems" in chart.title or "judged" in chart.title),
    }
    named = {value for chart in charts for value in chart.references.values() if isinstance(value, str)}
    assert named == {tag for tag in tags if tag.startswith("reference/")}
    assert tags["experts/dead_fraction/worst"] == tags["residual/rms/mtp_1"] == [1, 9]


def test_two_ranks_see_the_health_of_the_whole_step(run_file, whole, tmp_path):
    """Same rows, half on each rank: values are those of all ranks, not of the one that writes."""
    options = [f"--config={run_file}", f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=3"]
    result = subprocess.run(  # not from the program that is ready: Lightning starts the second process by its command
        [sys.executable, "-m", "app", "fit", *options, "--trainer.devices=2"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    one, two = scalars(whole, values=True), scalars(tmp_path / "run", values=True)
    for name in one:
        if name.startswith(("experts/", "residual/", "data/")):
            assert two[name][0] == pytest.approx(one[name][0], rel=0.05), name
        if re.match(r"quantization/.*\.w|weights/", name):  # other operands depend on which rows are quantised together
            assert two[name][0] == pytest.approx(one[name][0], rel=1e-6), name
    assert {name for name in one if name.startswith(("quantization/", "gradients/"))} <= two.keys()
    assert "speed/mfu" not in two, "a CPU has no peak to measure it against"


@pytest.mark.parametrize(
    ("option", "answer"),
    [
        ("--data.init_args.path=nowhere", "data.init_args.path: nowhere does not exist; prepare it: "),
        ("--data.init_args.sequence_length=32", "data.init_args.sequence_length: "),
        ("--data.init_args.micro_batch_size=3", "data.init_args.global_batch_size: 4 rows a step do not divide"),
        ("--model.init_args.backbone.num_experts_per_tok=9", "num_experts_per_tok"),
        ("--model.init_args.backbone.vocab_size=100", "vocab_size"),
        ("--model.init_args.optimizer.learning_rate=-1", "model.init_args.optimizer.learning_rate: -1"),
        ("--model.init_args.mtp_depths=0", "model.init_args.mtp_depths: 0"),
        ("--model.init_args.schedule.warmup_tokens=100000", "model.init_args.schedule: warmup_tokens + decay_tokens"),
        ("--model.init_args.init_from=nowhere", "model.init_args.init_from: nowhere does not exist"),
        ("--model.init_args.optimizer.learnin_rate=1", "unknown key model.init_args.optimizer.learnin_rate"),
    ],
)
def test_mistakes_in_model_and_data_cost_one_line(program, run_file, tmp_path, option, answer):
    result = start(program, run_file, tmp_path, option)
    assert result.code == 2, result.output
    last = result.output.splitlines()[-1]
    assert last.startswith("error: ")
    assert answer in last
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("option", "answer"),
    [
        (
            "--model.init_args.backbone.vocab_size=600",
            "vocab_size: 600 is less than the tokenizer's 8192",
        ),
        ("--data.init_args.micro_batch_size=3", "data.init_args.global_batch_size: 4 rows a step do not divide"),
        ("--model.init_args.schedule.warmup_tokens=100000", "model.init_args.schedule: warmup_tokens + decay_tokens"),
        ("--model.init_args.precision.recipe=nvfp4x", "recipe"),
        ("--model.init_args.init_from=nowhere", "model.init_args.init_from: nowhere does not exist"),
        ("--trainer.num_nodes=2", "trainer.num_nodes: 2 machines need torchrun"),
    ],
)
def test_no_corpus_is_prepared_for_a_rejected_configuration(program, run_file, tmp_path, option, answer):
    data = f"--data.init_args.path={tmp_path / 'data' / 'stdlib'}"
    result = start(program, run_file, tmp_path / "runs", data, "--model.init_args.backbone.vocab_size=8192", option)
    assert result.code == 2, result.output
    assert answer in result.output.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_validation_may_take_another_batch(program, run_file, whole):
    """Nothing of the result depends on it."""
    options = [f"--config={run_file}", f"--trainer.default_root_dir={whole.parent}"]
    usual = program.run("validate", *options)
    other = program.run("validate", *options, "--data.init_args.global_batch_size=6")
    assert (usual.code, other.code) == (0, 0), other.output
    assert other.output == usual.output


def test_a_damaged_newest_checkpoint_is_told_and_the_one_taken_named(program, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    newer, older = folder.checkpoints(run / "checkpoints")
    (newer / "meta.pt").write_bytes(b"")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "value_1 ="}) + "\n")
    for command in (
        ("generate", run, "--prompt", "value_1 =", "--max_new_tokens=2"),
        ("score", run, "--input", prompts.with_name("texts.jsonl"), "--output", tmp_path / "scores.jsonl"),
        ("export", run, "--output", tmp_path / "hf"),
        ("merge", run, run, "--output", tmp_path / "merged"),
        ("quantize", run, "--output", tmp_path / "nvfp4", "--calibration_tokens=256", "--evaluation_tokens=256"),
    ):
        (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "value_1 = 3"}) + "\n")
        result = program.run(*command)
        assert result.code == 0, result.output
        taken = rf"^(model: )?{re.escape(str(older))}[:\n]|^0.500000  run, step {folder.step_of(older)}$"
        assert re.search(taken, result.output, re.MULTILINE)
        assert f"warning: {newer} is damaged and passed over: meta.pt has 0 bytes" in result.output
