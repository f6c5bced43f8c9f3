"""Every bad value is refused with one line that names its key; every published shape is accepted."""

import dataclasses

import pytest

from modules.backbone.config import BackboneConfig
from modules.errors import UserError
from tests.modules.helpers import tiny_config

BAD = [
    ("vocab_size", 0, {}),
    ("hidden_size", -1, {}),
    ("layer_norm_epsilon", 0.0, {}),
    ("initializer_range", -0.1, {}),
    ("hybrid_override_pattern", "", {}),
    ("hybrid_override_pattern", "MXE", {}),
    ("num_nextn_predict_layers", 2, {}),
    ("num_nextn_predict_layers", -1, {}),
    ("mtp_hybrid_override_pattern", "", {}),
    ("mtp_hybrid_override_pattern", "*|E", {}),
    ("num_attention_heads", 0, {}),
    ("num_key_value_heads", 0, {}),
    ("num_key_value_heads", 3, {}),
    ("head_dim", 0, {}),
    ("intermediate_size", 0, {}),
    ("mamba_num_heads", 0, {}),
    ("mamba_head_dim", 0, {}),
    ("ssm_state_size", 0, {}),
    ("n_groups", 0, {}),
    ("n_groups", 3, {}),
    ("conv_kernel", 0, {}),
    ("chunk_size", 0, {}),
    ("time_step_min", 0.0, {}),
    ("time_step_min", 0.2, {}),
    ("time_step_floor", 0.0, {}),
    ("n_routed_experts", 0, {}),
    ("num_experts_per_tok", 0, {}),
    ("num_experts_per_tok", 9, {}),
    ("num_experts_per_tok", 3, {"n_group": 4, "topk_group": 1}),
    ("moe_intermediate_size", 0, {}),
    ("moe_latent_size", 0, {}),
    ("moe_shared_expert_intermediate_size", -1, {}),
    ("n_group", 0, {}),
    ("n_group", 3, {}),
    ("topk_group", 0, {}),
    ("topk_group", 2, {}),
]


@pytest.mark.parametrize(("key", "value", "others"), BAD, ids=[f"{key}={value!r}" for key, value, _ in BAD])
def test_a_bad_value_is_one_line_naming_its_key(key: str, value: object, others: dict) -> None:
    with pytest.raises(UserError, match=rf"^model\.backbone\.{key}: ") as caught:
        tiny_config(**{**others, key: value})
    message = str(caught.value)
    assert "\n" not in message
    assert repr(value) in message


def test_every_field_with_a_range_is_tried() -> None:
    free = {
        "tie_word_embeddings",
        "rescale_prenorm_residual",
        "use_conv_bias",
        "norm_topk_prob",
        "routed_scaling_factor",
        "time_step_max",  # tried through time_step_min, which it bounds
    }
    assert {field.name for field in dataclasses.fields(BackboneConfig)} == {key for key, *_ in BAD} | free


@pytest.mark.parametrize("letter", ["M", "E", "*", "-"])
def test_only_the_fields_of_used_mixers_are_needed(letter: str) -> None:
    everything = dataclasses.asdict(tiny_config())
    needed = {
        "M": ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups"),
        "E": ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
        "*": ("num_attention_heads", "num_key_value_heads", "head_dim"),
        "-": ("intermediate_size",),
    }[letter]
    shape = {"vocab_size": 64, "hidden_size": 32, "hybrid_override_pattern": letter}
    BackboneConfig(**shape, **{name: everything[name] for name in needed})
    for left_out in needed:
        with pytest.raises(UserError, match=left_out):
            BackboneConfig(**shape, **{name: everything[name] for name in needed if name != left_out})


def test_the_mtp_block_needs_its_mixers_fields_too() -> None:
    shape = {"vocab_size": 64, "hidden_size": 32, "hybrid_override_pattern": "-", "intermediate_size": 8}
    BackboneConfig(**shape, mtp_hybrid_override_pattern="no letters, but no MTP either")
    with pytest.raises(UserError, match="num_attention_heads"):
        BackboneConfig(**shape, num_nextn_predict_layers=1)


def test_sizes_that_follow() -> None:
    config = tiny_config(mamba_num_heads=6, mamba_head_dim=5, n_groups=3, ssm_state_size=7)
    assert config.mamba_inner_size == 30
    assert config.mamba_conv_size == 30 + 2 * 3 * 7
    assert config.expert_size == 16
    assert tiny_config(moe_latent_size=None).expert_size == 32


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_config().hidden_size = 3
