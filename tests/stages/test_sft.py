"""Fine-tuning as the program runs it: two processes = one, resumed = uninterrupted, bit for bit; both averages."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modules.checkpoints.names import EMBEDDING
from tests.app.helpers import ROOT, Program, load_tensors, same_checkpoint, scalars
from tests.modules.checkpoints.helpers import write_fit_folder
from tests.modules.helpers import make_network, tiny_config

STEPS = 8
BACKBONE = tiny_config(num_nextn_predict_layers=1)
RUN_FILE = """\
name: run
model:
  class_path: modules.sft.SFT
  init_args:
    backbone: {{vocab_size: 64, hidden_size: 32, hybrid_override_pattern: "ME*-ME", initializer_range: 0.15,
      num_attention_heads: 4, num_key_value_heads: 2, head_dim: 8, intermediate_size: 48, mamba_num_heads: 8,
      mamba_head_dim: 8, ssm_state_size: 8, n_groups: 2, chunk_size: 8, n_routed_experts: 8, num_experts_per_tok: 2,
      moe_intermediate_size: 24, moe_latent_size: 16, moe_shared_expert_intermediate_size: 40,
      routed_scaling_factor: 2.5, num_nextn_predict_layers: 1}}
    init_from: {base}
    loss_average: {average}
    precision: {{recipe: fp32}}
    optimizer: {{learning_rate: 1.0e-2, epsilon: 1.0e-4}}
    schedule: {{decay_tokens: 400}}
data: {{class_path: tests.stages.conversations.Conversations, init_args: {{steps: 8}}}}
trainer: {{accelerator: cpu, devices: 1}}
console: {{every_n_steps: 2}}
checkpoint: {{every_n_steps: 3}}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A MODEL whose rows of chat tokens are zeros."""
    network = make_network(BACKBONE)
    with torch.no_grad():
        network.backbone.embeddings.weight[[10, 11]] = 0
    return write_fit_folder(tmp_path_factory.mktemp("base") / "step=00000001", network)


def fit(program: Program, base: Path, average: str, folder: Path, *options: str) -> tuple[Path, str]:
    folder.mkdir(exist_ok=True)
    file = folder / "run.yaml"
    file.write_text(RUN_FILE.format(base=base, average=average), encoding="utf-8")
    arguments = ["fit", f"--config={file}", f"--trainer.default_root_dir={folder}", *options]
    if "--trainer.devices=2" in options:  # Lightning starts the second process by the command of the first
        done = subprocess.run([sys.executable, "-m", "app", *arguments], cwd=ROOT, capture_output=True, text=True)
        code, output = done.returncode, done.stdout + done.stderr
    else:
        result = program.run(*arguments)
        code, output = result.code, result.output
    assert code == 0, output
    return folder / "run", " ".join(output.split())


@pytest.mark.parametrize("average", ["tokens", "conversations"])
def test_two_processes_equal_one_and_a_resumed_run_the_whole(program, base, average, tmp_path) -> None:
    named = f"rows of {EMBEDDING} that were never learnt start anew: <|im_start|> <|im_end|>"
    one, output = fit(program, base, average, tmp_path / "one")
    assert named in output
    two, output = fit(program, base, average, tmp_path / "two", "--trainer.devices=2")
    assert named in output
    fit(program, base, average, tmp_path / "resumed", "--trainer.max_steps=4")
    resumed, output = fit(program, base, average, tmp_path / "resumed")
    assert "never learnt" not in output, "a run that goes on has its own rows"
    last = f"checkpoints/step={STEPS:08d}"
    same_checkpoint(resumed / last, one / last)
    alone, both = scalars(one, values=True), scalars(two, values=True)
    for name in ("loss", "next_token_loss", "mtp_loss_1", "mtp_loss_2", "gradient_norm"):
        assert both[f"training/{name}"] == pytest.approx(alone[f"training/{name}"], rel=1e-4), name
        assert len(alone[f"training/{name}"]) == STEPS
    tensors, others = load_tensors(one / last), load_tensors(two / last)
    for name, tensor in tensors.items():
        if name.startswith("model.network."):
            torch.testing.assert_close(others[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
