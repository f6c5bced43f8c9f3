"""The parameter counts of `plan` against the published ones, and what the command prints."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from app.__main__ import main
from app.commands import plan
from modules.backbone.config import BackboneConfig
from modules.backbone.model import Network
from modules.precision.recipe import PrecisionRule, apply

ROOT = Path(__file__).parent.parent.parent.parent
PRETRAIN = ROOT / "configs" / "pretrain"
TINY = {
    "vocab_size": 10,
    "hidden_size": 8,
    "hybrid_override_pattern": "ME*-",
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": 3,
    "mamba_num_heads": 4,
    "mamba_head_dim": 2,
    "ssm_state_size": 3,
    "n_groups": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 6,
    "moe_latent_size": 4,
    "moe_shared_expert_intermediate_size": 5,
    "num_nextn_predict_layers": 1,
}


def build(**fields: object) -> Network:
    with torch.device("meta"):
        return Network(BackboneConfig(**fields))  # type: ignore[arg-type]


def model_file(name: str) -> Network:
    return build(**yaml.safe_load((ROOT / "configs" / "model" / f"{name}.yaml").read_text(encoding="utf-8")))


def total(counts: dict[str, plan.Count]) -> plan.Count:
    return sum(counts.values(), plan.Count())


@pytest.mark.parametrize(
    ("name", "parameters", "elements"),
    [
        ("super", 120_668_687_360, 120_668_707_840),
        ("nano", 31_577_937_344, 31_577_940_288),
        ("ultra", 549_308_968_960, 549_308_993_536),
        ("nano_9b_v2", 8_888_227_328, 8_888_227_328),
    ],
)
def test_published_counts_without_mtp(name: str, parameters: int, elements: int):
    counts = plan.count_parts(model_file(name))
    counts.pop("MTP", None)
    assert total(counts).parameters == parameters
    assert total(counts).parameters + total(counts).biases == elements


def test_published_counts_of_super_with_mtp():
    count = total(plan.count_parts(model_file("super")))
    assert count.parameters == 123_611_012_096
    assert count.parameters + count.biases == 123_611_033_088


@pytest.mark.parametrize(
    ("name", "active", "without_embedding"),
    [("super", 12.77, 12.23), ("nano", 3.58, 3.23)],  # published: 12.7 / 12.1 and 3.6 / 3.2 billion
)
def test_active_parameters(name: str, active: float, without_embedding: float):
    counts = plan.count_parts(model_file(name))
    counts.pop("MTP", None)
    assert round(total(counts).active / 1e9, 2) == active
    assert round((total(counts).active - counts["embedding"].active) / 1e9, 2) == without_embedding


def test_parts_of_a_tiny_network_by_hand():
    counts = plan.count_parts(build(**TINY))
    inner, groups_times_state, heads = 8, 6, 4
    conv = inner + 2 * groups_times_state
    mamba = 8 * (inner + conv + heads) + conv * (4 + 1) + 3 * heads + inner + inner * 8
    assert {part: count.parameters for part, count in counts.items() if part != "MTP"} == {
        "Mamba-2": mamba,
        "attention": 8 * 8 + 2 * 8 * 4 + 8 * 8,
        "MLP": 2 * 8 * 3,
        "MoE routed experts": 4 * 2 * 4 * 6,
        "MoE shared expert": 2 * 8 * 5,
        "MoE latent projections": 2 * 8 * 4,
        "MoE router": 4 * 8,
        "norms": 5 * 8,
        "embedding": 80,
        "head": 80,
    }
    assert counts["MoE routed experts"].active == 2 * 2 * 4 * 6
    assert counts["MoE router"].biases == counts["MTP"].biases == 4


def test_a_shared_embedding_counts_once_and_works_twice():
    counts = plan.count_parts(build(**TINY | {"tie_word_embeddings": True, "num_nextn_predict_layers": 0}))
    assert (counts["embedding"].parameters, counts["head"].parameters) == (80, 0)
    assert (counts["embedding"].active, counts["head"].active) == (80, 80)


def test_every_parameter_is_counted():
    network = build(**TINY)
    count = total(plan.count_parts(network))
    assert count.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert count.biases == sum(buffer.numel() for buffer in network.buffers())


def test_the_plan_of_super(capsys: pytest.CaptureFixture[str]):
    code = main(
        ["plan", "--config", str(PRETRAIN / "super.yaml"), "--config", str(PRETRAIN.parent / "layout" / "gpu8.yaml")]
    )
    printed = capsys.readouterr().out
    assert code == 0
    assert "with MTP           123,611,012,096 (123,611,033,088)" in printed
    assert "without MTP        120,668,687,360 (120,668,707,840)" in printed
    assert "active per token   12,770,216,960 (10.6%)" in printed
    assert re.search(r"backbone\.layers\.\*\.mixer\.experts\.up_proj +bf16 +40 +\*", printed)
    assert re.search(r"warm-up +200,000,000,000 +7,947 ", printed)
    assert re.search(r"decay +5,000,000,000,000 +198,682 +0\.00045 to 4\.5e-06", printed)


def test_a_recipe_with_two_formats_shows_both():
    recipe = [PrecisionRule(pattern="lm_head", format="fp32"), PrecisionRule(pattern="*", format="bf16")]
    lines = plan.precision_lines(apply(recipe, build(**TINY)))
    assert sum(line.split()[:2] == ["lm_head", "fp32"] for line in lines) == 1
    assert sum(line.split()[0] == "backbone.embeddings" and line.split()[1] == "bf16" for line in lines) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "x"}, "model"),
        ({"schedule": {"warmup_tokens": 30_000_000_000_000}}, "model.schedule"),
        ({"backbone": "../model/missing.yaml"}, "missing.yaml"),
        ({"mtp_depths": 0}, "model.mtp_depths"),
        ({"mtp_dephts": 2}, "mtp_depths"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_mistake_costs_one_line(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tree = yaml.safe_load((PRETRAIN / "super.yaml").read_text(encoding="utf-8"))
    tree["model"]["init_args"]["backbone"] = str(ROOT / "configs" / "model" / "super.yaml")
    if "model" in change:
        tree |= change
    else:
        tree["model"]["init_args"] |= change
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert main(["plan", "--config", str(file)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_a_missing_file_is_named(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--config", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "error: nowhere.yaml: there is no such file (--config)\n"
