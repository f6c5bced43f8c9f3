"""config.json of published models, old and new, against the committed model files; every field honoured or refused."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml

from modules.backbone.config import BackboneConfig
from modules.checkpoints import config as module
from modules.checkpoints.config import GenerationDefaults, from_hugging_face, make_config, notes, to_hugging_face
from modules.checkpoints.start import check_fits
from modules.errors import UserError
from tests.modules.checkpoints.helpers import THEIRS
from tests.modules.helpers import tiny_config

FILE = Path("config.json")
MODELS = Path(__file__).parents[3] / "configs" / "model"

COMMON = {
    "architectures": ["NemotronHForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"},
    "bos_token_id": 1,
    "chunk_size": 128,
    "conv_kernel": 4,
    "eos_token_id": 2,
    "expand": 2,
    "head_dim": 128,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "model_type": "nemotron_h",
    "n_groups": 8,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "sliding_window": None,
    "ssm_state_size": 128,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.53.2",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "use_mamba_kernels": True,
    "vocab_size": 131072,
}
MIXTURE = {
    "mamba_ssm_cache_dtype": "float32",
    "max_position_embeddings": 262144,
    "n_group": 1,
    "n_shared_experts": 1,
    "norm_eps": 1e-05,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "mamba_head_dim": 64,
    "partial_rotary_factor": 1.0,
    "rope_theta": 10000,
    "topk_group": 1,
}
PUBLISHED: dict[str, dict] = {
    "nano": {
        **COMMON,
        **MIXTURE,
        "hidden_size": 2688,
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        "intermediate_size": 1856,
        "mamba_num_heads": 64,
        "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712,
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 52,
        "routed_scaling_factor": 2.5,
    },
    "super": {
        **COMMON,
        **MIXTURE,
        "hidden_size": 4096,
        "hybrid_override_pattern": (
            "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
        ),
        "intermediate_size": 2688,
        "mamba_num_heads": 128,
        "moe_intermediate_size": 2688,
        "moe_latent_size": 1024,
        "moe_shared_expert_intermediate_size": 5376,
        "moe_shared_expert_overlap": False,
        "mtp_hybrid_override_pattern": "*E",
        "n_routed_experts": 512,
        "num_experts_per_tok": 22,
        "num_hidden_layers": 88,
        "num_nextn_predict_layers": 1,
        "routed_scaling_factor": 5.0,
    },
    "nano_9b_v2": {
        **COMMON,
        "hidden_size": 4480,
        "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
        "intermediate_size": 15680,
        "mamba_head_dim": 80,
        "mamba_num_heads": 128,
        "max_position_embeddings": 131072,
        "num_attention_heads": 40,
        "num_hidden_layers": 56,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "time_step_limit": [0.0, float("inf")],
    },
}
"""What the published files say, by the name of the model file that describes the same network."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_is_the_committed_model(name):
    ours = make_config(yaml.safe_load((MODELS / f"{name}.yaml").read_text()), FILE)
    theirs = from_hugging_face(PUBLISHED[name], FILE)
    check_fits(ours, theirs, FILE)
    check_fits(theirs, ours, FILE)
    assert ours.num_nextn_predict_layers == theirs.num_nextn_predict_layers
    assert notes(PUBLISHED[name], FILE) == []


def test_the_first_generation_names_the_head_width_otherwise():
    raw = {key: value for key, value in COMMON.items() if key != "head_dim"}
    raw |= {"attention_head_dim": 96, "hybrid_override_pattern": "M-*", "num_hidden_layers": 3}
    assert from_hugging_face(raw, FILE).head_dim == 96
    with pytest.raises(UserError, match="attention_head_dim 96 contradicts head_dim 128"):
        from_hugging_face(raw | {"head_dim": 128}, FILE)


def test_missing_fields_have_the_defaults_of_transformers(transformers_module):
    """Ours differ, and a file from its save_pretrained may leave any of them out."""
    theirs = transformers_module.NemotronHConfig()
    ours = from_hugging_face({"model_type": "nemotron_h"}, FILE)
    for field in dataclasses.fields(BackboneConfig):
        if field.name not in ("hybrid_override_pattern", "mtp_hybrid_override_pattern"):
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert ours.hybrid_override_pattern == theirs.hybrid_override_pattern


def test_every_field_of_transformers_is_in_exactly_one_table(transformers_module):
    tables = [set(module.DEFAULTS), set(module.FIXED), module.IGNORED, {*module.MAIN, *module.MTP}]
    for key in transformers_module.NemotronHConfig().to_dict():
        assert sum(key in table for table in tables) == 1, key
    honoured = {field.name for field in dataclasses.fields(BackboneConfig)}
    assert honoured == {*module.DEFAULTS, "hybrid_override_pattern", "mtp_hybrid_override_pattern"}


@pytest.mark.parametrize("names", [("linear_attention", "full_attention"), ("mamba", "attention")])
@pytest.mark.parametrize("key", ["layers_block_type", "layer_types"])
def test_layer_lists_with_old_and_new_names(key, names):
    raw = {"model_type": "nemotron_h", key: [names[0], "moe", names[1], "mlp"], "num_nextn_predict_layers": 1}
    raw["mtp_layers_block_type"] = [names[1], names[0], "moe"]
    config = from_hugging_face(raw, FILE)
    assert (config.hybrid_override_pattern, config.mtp_hybrid_override_pattern) == ("ME*-", "*ME")


def test_older_keywords_are_honoured(transformers_module):
    older = {
        "mamba_n_groups": 4,
        "mamba_d_conv": 3,
        "mamba_dt_min": 0.01,
        "mamba_dt_max": 0.2,
        "mamba_dt_init_floor": 0.001,
        "mamba_conv_bias": False,
        "mamba_chunk_size": 32,
    }
    theirs = transformers_module.NemotronHConfig(**older)
    ours = from_hugging_face({"model_type": "nemotron_h", **older, "num_local_experts": 16}, FILE)
    for name in module.OLDER_NAMES.values():
        if name not in ("time_step_limit", "n_routed_experts"):
            assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.n_routed_experts == 16
    assert from_hugging_face({"model_type": "nemotron_h", "num_key_value_heads": None}, FILE).num_key_value_heads == 32


REFUSED: dict[str, tuple[dict, str]] = {
    "family": ({"model_type": "llama"}, "model_type 'llama'"),
    "head": ({"architectures": ["NemotronHForSequenceClassification"]}, "NemotronHForSequenceClassification"),
    "bias": ({"use_bias": True}, "use_bias True is not supported"),
    "MLP bias": ({"mlp_bias": True}, "mlp_bias True"),
    "attention bias": ({"attention_bias": True}, "attention_bias True"),
    "projection bias": ({"mamba_proj_bias": True}, "mamba_proj_bias True"),
    "activation": ({"mlp_hidden_act": "gelu"}, "mlp_hidden_act 'gelu'"),
    "Mamba's activation": ({"mamba_hidden_act": "gelu"}, "mamba_hidden_act 'gelu'"),
    "dt limit": ({"time_step_limit": [0.001, 0.1]}, r"time_step_limit \[0.001, 0.1\]"),
    "old dt limit": ({"mamba_dt_limit": [0.001, {"__float__": "Infinity"}]}, r"time_step_limit \[0.001, inf\]"),
    "fp32 residual": ({"residual_in_fp32": True}, "residual_in_fp32"),
    "window": ({"sliding_window": 128}, "sliding_window 128"),
    "quantised": ({"quantization_config": {"quant_method": "modelopt", "ignore": ["x" * 99]}}, "quantization_config"),
    "two MTP blocks": ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers 2"),
    "depth": ({"num_hidden_layers": 5}, "num_hidden_layers is 5, but 4 layers are listed"),
    "two lists": (
        {"hybrid_override_pattern": "ME*-", "layers_block_type": ["mlp"]},
        "layers_block_type contradicts",
    ),
    "layer": ({"layers_block_type": ["mamba", "rwkv"]}, "names a layer 'rwkv'"),
    "letter": ({"hybrid_override_pattern": "M|E"}, "hybrid_override_pattern: 'M|E' must be"),
    "layers as a number": ({"hybrid_override_pattern": 3}, "must be a layer string"),
    "MTP lists": (
        {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "E", "mtp_layers_block_type": ["moe", "moe"]},
        "mtp_layers_block_type contradicts mtp_hybrid_override_pattern",
    ),
    "epsilon twice": ({"rms_norm_eps": 1e-6}, "rms_norm_eps 1e-06 contradicts layer_norm_epsilon 1e-05"),
    "type": ({"hidden_size": "64"}, "hidden_size '64' must be int"),
    "truth for a number": ({"conv_kernel": True}, "conv_kernel True must be int"),
    "not a number": ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor nan must be finite"),
    "too large": ({"layer_norm_epsilon": 10**400}, "layer_norm_epsilon 1000.* must be finite"),
    "dt limit that is none": ({"time_step_limit": [0.0, {"__float__": "x"}]}, "time_step_limit"),
    "architectures": ({"architectures": 5}, "architectures 5"),
    "long lists": ({"hybrid_override_pattern": "M" * 999, "layers_block_type": ["moe"] * 999}, "contradicts"),
    "range": ({"hidden_size": 0}, "hidden_size: 0 must be positive"),
    "groups": ({"n_groups": 7}, "n_groups: 7 must divide mamba_num_heads"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_computed_here_is_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        from_hugging_face({"model_type": "nemotron_h", **changes}, FILE)
    assert str(caught.value).startswith("config.json: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_unknown_keys_and_dropout_are_told():
    raw = {"model_type": "nemotron_h", "block_configs": [], "attention_dropout": 0.1, "expand": 7}
    first, second = notes(raw, FILE)
    assert first == "config.json: unknown keys are ignored: block_configs"
    assert "attention_dropout 0.1 is ignored" in second


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe_latent_size": None, "num_nextn_predict_layers": 0},
        {"n_group": 4, "topk_group": 2, "tie_word_embeddings": True, "mtp_hybrid_override_pattern": "M*E-"},
        {"use_conv_bias": False, "rescale_prenorm_residual": False, "layer_norm_epsilon": 1e-6},
    ],
)
def test_what_is_written_is_read_back(transformers_module, tmp_path, changes):
    config = tiny_config(**changes)
    raw = to_hugging_face(config, torch.float32)
    assert raw["hybrid_override_pattern"] == config.hybrid_override_pattern
    assert raw["mtp_hybrid_override_pattern"] == config.mtp_hybrid_override_pattern
    assert len(raw["layers_block_type"]) == raw["num_hidden_layers"] == len(config.hybrid_override_pattern)
    assert len(raw["mtp_layers_block_type"]) == len(config.mtp_hybrid_override_pattern)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    json.loads((tmp_path / "config.json").read_text(), parse_constant=pytest.fail)
    again = from_hugging_face(json.loads((tmp_path / "config.json").read_text()), FILE)
    assert again == config or not config.num_nextn_predict_layers
    check_fits(config, again, FILE)
    theirs = transformers_module.AutoConfig.from_pretrained(tmp_path)
    for key, value in raw.items():
        if key in module.DEFAULTS or key in module.FIXED:
            assert getattr(theirs, key) == value, key
    assert theirs.hybrid_override_pattern == config.hybrid_override_pattern
    assert theirs.mtp_hybrid_override_pattern == config.mtp_hybrid_override_pattern


def test_what_is_written_keeps_what_does_not_concern_us():
    kept = {**PUBLISHED["super"], "quantization_config": {}, "rope_theta": 5}
    generation = GenerationDefaults(eos_token_ids=(2, 11), bos_token_id=1)
    raw = to_hugging_face(tiny_config(), torch.bfloat16, generation, kept)
    assert (raw["rope_theta"], raw["max_position_embeddings"]) == (5, 262144)
    assert (raw["eos_token_id"], raw["bos_token_id"], raw["pad_token_id"]) == ([2, 11], 1, None)
    assert not raw.keys() & {"auto_map", "quantization_config", "transformers_version"}
    assert raw["dtype"] == raw["torch_dtype"] == "bfloat16"
    assert from_hugging_face(raw, FILE) == tiny_config()


def test_sizes_of_layers_that_are_not_there_divide_for_others(transformers_module):
    config = tiny_config(
        hybrid_override_pattern="M",
        num_nextn_predict_layers=0,
        num_attention_heads=0,
        num_key_value_heads=0,
        head_dim=0,
    )
    raw = to_hugging_face(config)
    assert raw["num_attention_heads"] == THEIRS["num_attention_heads"] * 8
    assert transformers_module.NemotronHConfig(**raw).num_key_value_heads == 8
    check_fits(config, from_hugging_face(raw, FILE), FILE)
