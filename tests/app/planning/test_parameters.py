"""Parameter counts against the published ones, and the formats of modules."""

from pathlib import Path

import pytest
import torch
import yaml

from app.planning.parameters import Count, count_parts, parameter_lines
from modules.backbone.config import BackboneConfig
from modules.backbone.model import Network

ROOT = Path(__file__).parent.parent.parent.parent
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


def total(counts: dict[str, Count]) -> Count:
    return sum(counts.values(), Count())


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
    counts = count_parts(model_file(name))
    counts.pop("MTP", None)
    assert total(counts).parameters == parameters
    assert total(counts).parameters + total(counts).biases == elements


def test_published_counts_of_super_with_mtp():
    count = total(count_parts(model_file("super")))
    assert count.parameters == 123_611_012_096
    assert count.parameters + count.biases == 123_611_033_088


@pytest.mark.parametrize(
    ("name", "active", "without_embedding"),
    [("super", 12.77, 12.23), ("nano", 3.58, 3.23)],  # published: 12.7 / 12.1 and 3.6 / 3.2 billion
)
def test_active_parameters(name: str, active: float, without_embedding: float):
    counts = count_parts(model_file(name))
    counts.pop("MTP", None)
    assert round(total(counts).active / 1e9, 2) == active
    assert round((total(counts).active - counts["embedding"].active) / 1e9, 2) == without_embedding


def test_parts_of_a_tiny_network_by_hand():
    counts = count_parts(build(**TINY))
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


def test_a_matrix_that_embedding_and_head_share_counts_once():
    plain = TINY | {"num_nextn_predict_layers": 0}
    tied, apart = (build(**plain | {"tie_word_embeddings": shared}) for shared in (True, False))
    count, separate = total(count_parts(tied)), total(count_parts(apart))
    assert count_parts(tied)["embedding"] == Count(parameters=80, active=80)
    assert count.parameters == sum(parameter.numel() for parameter in tied.parameters()) == separate.parameters - 80
    assert count.active == separate.active - 80
    used, without = (line.split("  ")[-1].strip() for line in parameter_lines(tied, 0)[-2:])
    assert used == f"{count.active:,} ({count.active / count.parameters:.1%}), MTP left out"
    assert without == f"{count.active:,}: it is the head too"
    assert parameter_lines(apart, 0)[-1].endswith(f" {separate.active - 80:,}")


def test_no_more_is_active_than_there_is():
    dense = {"hybrid_override_pattern": "M*-", "num_nextn_predict_layers": 0, "tie_word_embeddings": True}
    assert "(100.0%)" in parameter_lines(build(**TINY | dense), 0)[-2]


def test_every_parameter_is_counted():
    network = build(**TINY)
    count = total(count_parts(network))
    assert count.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert count.biases == sum(buffer.numel() for buffer in network.buffers())
