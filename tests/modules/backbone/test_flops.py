"""The closed-form FLOPs equal the matrix products that a real forward pass, loss and backward pass run."""

import random

import pytest
import torch

from modules.backbone.config import BackboneConfig
from modules.backbone.flops import decode_flops, matmul_flops, recomputed_flops, training_flops_per_token
from modules.objectives.next_token import next_token_loss
from modules.ops import native
from modules.ops.flops import count_flops
from tests.modules.helpers import BF16, FP32, counts_of, document_ids, make_network, packed_batch, tiny_config

CASES = {
    "all": ({}, 16, 1, 2),
    "no_mtp": ({"num_nextn_predict_layers": 0}, 16, 2, 0),
    "one_depth": ({}, 24, 2, 1),
    "mamba": ({"hybrid_override_pattern": "M", "num_nextn_predict_layers": 0}, 40, 1, 0),
    "attention": ({"hybrid_override_pattern": "*", "num_nextn_predict_layers": 0}, 13, 1, 0),
    "mlp": ({"hybrid_override_pattern": "-", "num_nextn_predict_layers": 0}, 13, 2, 0),
    "mixture": ({"hybrid_override_pattern": "E", "num_nextn_predict_layers": 0}, 13, 2, 0),
    "no_latent": ({"moe_latent_size": None}, 16, 1, 1),
    "no_shared_expert": ({"moe_shared_expert_intermediate_size": 0}, 16, 1, 2),
    "tied": ({"tie_word_embeddings": True}, 17, 1, 1),
    "odd_length": ({}, 29, 3, 2),
    "shorter_than_a_chunk": ({}, 5, 1, 1),
    "one_chunk": ({}, 8, 2, 1),
    "one_group": ({"n_groups": 1, "chunk_size": 7}, 31, 1, 2),
    "group_per_head": ({"n_groups": 8, "chunk_size": 16}, 31, 1, 2),
    "one_key_head": ({"num_key_value_heads": 1, "head_dim": 12}, 19, 1, 1),
    "as_many_key_heads": ({"num_key_value_heads": 4, "head_dim": 24}, 19, 1, 1),
    "top_1": ({"num_experts_per_tok": 1}, 16, 1, 1),
    "all_experts": ({"num_experts_per_tok": 8, "n_group": 2, "topk_group": 2}, 16, 1, 1),
    "limited_groups": ({"n_group": 4, "topk_group": 2, "norm_topk_prob": False}, 16, 1, 1),
    "unaligned_experts": ({"moe_latent_size": 14, "moe_intermediate_size": 23}, 16, 1, 1),
    "long_mtp_block": ({"mtp_hybrid_override_pattern": "M*-E"}, 18, 1, 2),
    "deep": ({"hybrid_override_pattern": "MEM*ME-M*E", "vocab_size": 101}, 33, 1, 1),
}


SMALL = {"num_attention_heads": 1, "num_key_value_heads": 1, "mamba_num_heads": 1, "n_groups": 1, "ssm_state_size": 1}
CASES |= {
    "one_position": ({}, 1, 2, 1),
    "chunks_of_one": ({"chunk_size": 1}, 6, 1, 1),
    "one_head": (SMALL, 9, 1, 1),
    "one_expert": ({"n_routed_experts": 1, "num_experts_per_tok": 1}, 9, 1, 1),
}


def random_case(seed: int) -> tuple[dict, int, int, int]:
    """Shapes that nobody chose: any letters, widths, groups and lengths."""
    draw = random.Random(seed)
    letters = ["".join(draw.choices("ME*-", k=draw.randint(1, 5))) for _ in range(2)]
    key_heads, groups, experts = draw.randint(1, 3), draw.randint(1, 3), draw.randint(2, 9)
    fields = {
        "vocab_size": draw.randint(3, 90),
        "hidden_size": 4 * draw.randint(1, 12),
        "hybrid_override_pattern": letters[0],
        "mtp_hybrid_override_pattern": letters[1],
        "num_key_value_heads": key_heads,
        "num_attention_heads": key_heads * draw.randint(1, 3),
        "head_dim": 4 * draw.randint(1, 5),
        "intermediate_size": draw.randint(1, 50),
        "n_groups": groups,
        "mamba_num_heads": groups * draw.randint(1, 3),
        "mamba_head_dim": draw.randint(1, 12),
        "ssm_state_size": draw.randint(1, 12),
        "chunk_size": draw.randint(1, 20),
        "n_routed_experts": experts,
        "num_experts_per_tok": draw.randint(1, experts),
        "moe_intermediate_size": draw.randint(1, 30),
        "moe_latent_size": draw.choice([None, draw.randint(1, 30)]),
        "moe_shared_expert_intermediate_size": draw.choice([0, draw.randint(1, 30)]),
        "tie_word_embeddings": draw.random() < 0.5,
    }
    depths = draw.randint(0, 2)
    return {**fields, "num_nextn_predict_layers": min(depths, 1)}, draw.randint(1, 45), draw.randint(1, 3), depths


CASES |= {f"random_{seed}": random_case(seed) for seed in range(20)}


def training_pass(config: BackboneConfig, length: int, rows: int, depths: int, recipe=FP32, checkpointed: bool = False):
    network = make_network(config, recipe).train()
    if checkpointed:
        network.checkpoint_activations()
    batch = packed_batch(document_ids(*[[length]] * rows), config.vocab_size)

    def run() -> None:
        parts = next_token_loss(network, batch, counts_of(batch, depths), depths, 0.3)
        parts.loss.backward()

    return run


@pytest.mark.parametrize("case", CASES)
def test_a_training_pass_runs_the_counted_products(case: str) -> None:
    changes, length, rows, depths = CASES[case]
    config = tiny_config(**changes)
    counted = count_flops(training_pass(config, length, rows, depths))
    assert sum(count.total for count in matmul_flops(config, length, depths).values()) * rows == counted
    assert training_flops_per_token(config, length, depths) == pytest.approx(counted / (rows * length), rel=1e-12)


RECOMPUTED = ["all", "mamba", "attention", "mlp", "mixture", "no_latent", "no_shared_expert", "long_mtp_block"]
CASES["experts_alone"] = ({"moe_latent_size": None, "moe_shared_expert_intermediate_size": 0}, 16, 1, 1)
RECOMPUTED += ["experts_alone", "one_position", *(f"random_{seed}" for seed in range(6))]


@pytest.mark.parametrize("recipe", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", RECOMPUTED)
def test_checkpointing_runs_the_counted_products_again(case: str, recipe) -> None:
    changes, length, rows, depths = CASES[case]
    config = tiny_config(**changes)
    on, off = (count_flops(training_pass(config, length, rows, depths, recipe, again)) for again in (True, False))
    assert recomputed_flops(config, length, depths) * rows == on - off


def test_the_format_does_not_change_the_count() -> None:
    config = tiny_config()
    counted = {count_flops(training_pass(config, 16, 2, 2, recipe)) for recipe in (FP32, BF16)}
    assert counted == {2 * sum(count.total for count in matmul_flops(config, 16, 2).values())}


def test_forward_alone() -> None:
    config = tiny_config()
    network = make_network(config).eval()
    batch = packed_batch(document_ids([29]), config.vocab_size)
    with torch.no_grad():
        counted = count_flops(lambda: next_token_loss(network, batch, counts_of(batch, 2), 2, 0.3))
    assert counted == sum(count.forward for count in matmul_flops(config, 29, 2).values())


def test_each_part_is_what_its_modules_run() -> None:
    full = matmul_flops(tiny_config(), 16, 1)
    assert [*full] == [
        "Mamba-2 projections",
        "Mamba-2 scan",
        "MoE router",
        "MoE latent projections",
        "MoE routed experts",
        "MoE shared expert",
        "attention projections",
        "attention scores",
        "MLP",
        "MTP eh_proj",
        "MTP attention projections",
        "MTP attention scores",
        "MTP MoE router",
        "MTP MoE latent projections",
        "MTP MoE routed experts",
        "MTP MoE shared expert",
        "head",
        "MTP head",
    ]
    network = make_network(tiny_config())
    x = torch.zeros(1, 16, 32)
    layers = network.backbone.layers
    attention, moe = layers[2].mixer, layers[1].mixer
    assert full["attention projections"].forward == sum(
        count_flops(lambda module=module, width=width: module(torch.zeros(1, 16, width)))
        for module, width in ((attention.q_proj, 32), (attention.k_proj, 32), (attention.v_proj, 32))
    ) + count_flops(lambda: attention.o_proj(torch.zeros(1, 16, 32)))
    assert full["MoE shared expert"].forward == 2 * count_flops(lambda: moe.shared_experts(x))
    assert full["MoE router"].forward == 2 * count_flops(lambda: moe.gate(x))
    assert full["MLP"].forward == count_flops(lambda: layers[3].mixer(x))
    assert full["head"].forward == count_flops(lambda: network.logits(x))


def recurrent_step(config: BackboneConfig) -> int:
    """FLOPs of one token of the recurrence, with its outer product and its readout as matrix products."""
    heads, channels, states = config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size
    x, B, C = torch.ones(heads, channels, 1), torch.ones(heads, 1, states), torch.ones(heads, states, 1)
    return count_flops(lambda: torch.bmm(torch.bmm(x, B), C))


@pytest.mark.parametrize("case", ["all", "no_latent", "no_shared_expert", "one_key_head", "deep"])
def test_decoding_runs_the_products_of_one_position(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass of T positions costs T times a decoded one at context T, but for the scan's own algorithm."""
    monkeypatch.setattr(native, "load", lambda: (None, "torch's counter does not see C code"))
    config, length = tiny_config(**CASES[case][0]), 24
    network = make_network(config).eval()
    tokens = torch.zeros(1, length, dtype=torch.int64)
    with torch.no_grad():
        counted = count_flops(lambda: network.logits(network(tokens).hidden))
    scan = matmul_flops(config, length, 0)["Mamba-2 scan"].forward
    decoded = decode_flops(config, length)
    assert decoded["Mamba-2 scan"] == config.hybrid_override_pattern.count("M") * recurrent_step(config)
    assert sum(decoded.values()) - decoded["Mamba-2 scan"] == (counted - scan) / length
