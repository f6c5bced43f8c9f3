"""Models that transformers saved load without loss: every tensor bit-equal, logits equal to transformers'."""

import json

import pytest
import torch

from modules.checkpoints.config import to_hugging_face
from modules.checkpoints.load import load_model
from modules.checkpoints.source import open_model
from tests.modules.checkpoints.helpers import made_comparable, public_tensors, read_shards, their_model, write_shards
from tests.modules.helpers import assert_close, make_network, tiny_config

LETTERS = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
CASES: dict[str, dict] = {
    "latent": {},
    "no latent": {"moe_latent_size": None},
    "expert groups": {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "raw weights": {"norm_topk_prob": False, "routed_scaling_factor": 1},
    "convolution of 3, no bias": {"conv_kernel": 3, "use_conv_bias": False},
    "four groups": {"n_groups": 4},
    "tied in name": {"tie_word_embeddings": True},
    "large epsilon": {"layer_norm_epsilon": 0.1},
    "shared expert as wide as an MLP": {"moe_shared_expert_intermediate_size": 0},
    "shared expert against its count": {"n_shared_experts": 0},
    "two shared experts in name": {"n_shared_experts": 2},
    "MTP in name": {"num_nextn_predict_layers": 1},
    "Nano v2": {"layers_block_type": [LETTERS[letter] for letter in "M-M*-"]},
    "only MLP": {"layers_block_type": ["mlp", "mlp"]},
}


def logits_of(loaded, tokens):
    with torch.inference_mode():
        return loaded.network.logits(loaded.network(tokens).hidden)


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_logits_equal_transformers(transformers_module, tmp_path, changes):
    theirs = their_model(transformers_module, **changes)
    theirs.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    tokens = torch.randint(0, 96, (2, 21), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
    assert_close(logits_of(loaded, tokens), expected, 1e-4, "logits")
    stored = read_shards(tmp_path)
    ours = public_tensors(loaded.network)
    assert ours.keys() == stored.keys()
    assert all(torch.equal(ours[name], stored[name]) for name in stored)


def test_shards_with_an_index(transformers_module, tmp_path):
    theirs = their_model(transformers_module)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    stored, ours = read_shards(tmp_path), public_tensors(load_model(tmp_path).network)
    assert all(torch.equal(ours[name], stored[name]) for name in stored)


def test_bf16_weights_compute_in_bf16_as_transformers_does(transformers_module, tmp_path):
    """The residual stream and every product are bf16 in both: as close as rounding allows, unlike fp32 against bf16."""
    their_model(transformers_module).bfloat16().save_pretrained(tmp_path)
    theirs = made_comparable(transformers_module.NemotronHForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16))
    tokens = torch.randint(0, 96, (2, 21), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
    loaded = load_model(tmp_path)
    with torch.inference_mode():
        assert loaded.network(tokens).hidden.dtype == torch.bfloat16
    assert_close(logits_of(loaded, tokens), expected, 0.1, "logits")
    stored, ours = read_shards(tmp_path), public_tensors(loaded.network)
    assert all(torch.equal(ours[name].bfloat16(), stored[name].bfloat16()) for name in stored), "no bit is lost"


@pytest.mark.parametrize("pattern", ["*E", "M-E*"])
def test_mtp_weights_are_kept(tmp_path, pattern):
    network = make_network(tiny_config(mtp_hybrid_override_pattern=pattern))
    tensors = public_tensors(network)
    last = len(pattern) - 1
    for name in ("0.enorm.weight", "0.hnorm.weight", "0.eh_proj.weight", f"{last}.final_layernorm.weight"):
        assert f"mtp.layers.{name}" in tensors
    write_shards(tmp_path, tensors, to_hugging_face(network.config), shards=3)
    loaded = load_model(tmp_path)
    assert loaded.source.config == network.config
    tokens = torch.randint(0, 64, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours, expected = loaded.network(tokens, mtp_depths=3), network(tokens, mtp_depths=3)
    for a, b in zip(ours.mtp_hidden, expected.mtp_hidden, strict=True):
        assert torch.equal(a, b)


def test_a_model_without_its_mtp_weights_has_no_mtp_block(transformers_module, tmp_path):
    their_model(transformers_module, num_nextn_predict_layers=1).save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.network.mtp is None
    assert loaded.source.notes == [f"{tmp_path}: the files hold no MTP weights, so the network has no MTP block"]


def test_a_tied_head_is_tied(tmp_path):
    network = make_network(tiny_config(tie_word_embeddings=True, num_nextn_predict_layers=0))
    tensors = public_tensors(network)
    assert "lm_head.weight" not in tensors
    write_shards(tmp_path / "tied", tensors, to_hugging_face(network.config))
    loaded = load_model(tmp_path / "tied")
    assert loaded.network.lm_head.weight is loaded.network.backbone.embeddings.weight
    assert torch.equal(loaded.network.lm_head.weight, tensors["backbone.embeddings.weight"])
    own_head = {**tensors, "lm_head.weight": torch.ones(64, 32)}
    write_shards(tmp_path / "own", own_head, to_hugging_face(network.config))
    assert torch.equal(load_model(tmp_path / "own").network.lm_head.weight, own_head["lm_head.weight"])


def test_zero_tensors_stand_for_no_shared_expert(transformers_module, tmp_path):
    """transformers builds a shared expert in any case: a file for it holds one of width 1 that adds nothing."""
    from modules.checkpoints.names import placeholder_shapes

    network = make_network(tiny_config(moe_shared_expert_intermediate_size=0, num_nextn_predict_layers=0))
    zeros = {name: torch.zeros(shape) for name, shape in placeholder_shapes(network.config).items()}
    assert len(zeros) == 4
    write_shards(tmp_path, {**public_tensors(network), **zeros}, to_hugging_face(network.config, torch.float32))
    loaded = load_model(tmp_path)
    assert loaded.source.config == network.config
    theirs, report = transformers_module.NemotronHForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    made_comparable(theirs)
    tokens = torch.randint(0, 64, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_close(logits_of(loaded, tokens), theirs(tokens, use_cache=False).logits, 1e-4)
    write_shards(
        tmp_path,
        {**public_tensors(network), **{name: zero + 1 for name, zero in zeros.items()}},
        {**to_hugging_face(network.config)},
    )
    assert load_model(tmp_path).source.config.moe_shared_expert_intermediate_size == 1


def test_special_tokens_come_from_generation_config_then_config_then_tokenizer(tmp_path):
    network = make_network(tiny_config())
    raw = {**to_hugging_face(network.config), "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": None}
    write_shards(tmp_path, public_tensors(network), raw)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 11], "temperature": 1.0}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<unk>"}))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 5, "content": "<unk>"}]}))
    source = open_model(tmp_path)
    assert source.tokenizer_folder == tmp_path
    found = source.generation
    assert (found.eos_token_ids, found.bos_token_id, found.pad_token_id) == ((2, 11), 1, 5)
    assert found.other == {"temperature": 1.0}
