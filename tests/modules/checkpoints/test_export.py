"""What is exported is what transformers loads, and what comes back to the bit."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.planning.parameters import count_parts
from datamodules.tokenizer import Tokenizer
from modules.backbone.model import Network
from modules.checkpoints.export import export
from modules.checkpoints.load import load_model
from modules.checkpoints.source import open_model
from modules.errors import UserError
from tests.modules.checkpoints.folders import (
    public_tensors,
    stored_tensors,
    write_fit_folder,
    write_hf_folder,
)
from tests.modules.helpers import assert_close, make_network, tiny_config

CASES: dict[str, dict[str, Any]] = {
    "everything": {},
    "without MTP": {"num_nextn_predict_layers": 0},
    "tied head": {"tie_word_embeddings": True},
    "no latent": {"moe_latent_size": None},
    "no shared expert": {"moe_shared_expert_intermediate_size": 0},
    "expert groups": {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "another MTP block": {"mtp_hybrid_override_pattern": "ME*-"},
    "no convolution bias": {"use_conv_bias": False, "conv_kernel": 3},
    "no mixture": {"hybrid_override_pattern": "M*-", "mtp_hybrid_override_pattern": "*"},
    "no attention": {"hybrid_override_pattern": "EM", "mtp_hybrid_override_pattern": "-"},
}
BIAS = "e_score_correction_bias"
SHARDS = 20_000


@pytest.fixture(scope="module")
def transformers_module():
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def write(source: Path, output: Path, dtype: Any = "auto", limit: int = SHARDS) -> Path:
    export(open_model(source), output, dtype=dtype, max_shard_bytes=limit, report=lambda line: None)
    return output


def with_head(network: Network) -> dict[str, Tensor]:
    return public_tensors(network) | {"lm_head.weight": network.lm_head.weight.detach()}


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("limit", [10**9, SHARDS], ids=["one file", "shards"])
@pytest.mark.parametrize("kind", ["fit", "hf fp32", "hf bf16"])
def test_every_tensor_keeps_its_bits(tmp_path: Path, kind: str, limit: int):
    network = make_network(tiny_config())
    dtype = torch.bfloat16 if kind == "hf bf16" else torch.float32
    source = tmp_path / "source"
    write_fit_folder(source, network) if kind == "fit" else write_hf_folder(source, network, dtype)
    written = write(source, tmp_path / "hf", limit=limit)
    assert (written / "model.safetensors.index.json").exists() == (limit == SHARDS)
    expected = {
        name: tensor if name.endswith(BIAS) else tensor.to(dtype) for name, tensor in public_tensors(network).items()
    }
    assert_same_tensors(stored_tensors(written), expected)
    again = write(written, tmp_path / "again", limit=limit)
    assert_same_tensors(stored_tensors(again), expected)
    assert json.loads((again / "config.json").read_text()) == json.loads((written / "config.json").read_text())
    assert json.loads((written / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_transformers_and_import_agree(tmp_path: Path, transformers_module: Any, dtype: str, changes: dict[str, Any]):
    network = make_network(tiny_config(**changes))
    with torch.no_grad():  # as trained models have them: dt below the 0.001 that transformers would raise it to
        for layer in network.backbone.layers:
            if hasattr(layer.mixer, "dt_bias"):
                layer.mixer.dt_bias.sub_(8)
    written = write(write_fit_folder(tmp_path / "step=00000020", network), tmp_path / "hf", dtype)
    model, info = transformers_module.AutoModelForCausalLM.from_pretrained(
        written, dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info
    wanted = torch.float32 if dtype == "fp32" else torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    back = load_model(written).network
    rounded = {
        name: tensor if name.endswith(BIAS) else tensor.to(wanted).float()
        for name, tensor in with_head(network).items()
    }
    assert_same_tensors({name: tensor.float() for name, tensor in with_head(back).items()}, rounded)
    for name, tensor in model.state_dict().items():
        if ".experts." not in name and name.replace("model.", "backbone.", 1) in rounded:
            assert torch.equal(tensor.float(), rounded[name.replace("model.", "backbone.", 1)]), name
    model.float().eval().set_experts_implementation("eager")
    ours = load_model(written, dtype="fp32").network
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert_close(ours.logits(ours(tokens).hidden), model(tokens, use_cache=False).logits, 1e-4, "logits")


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_what_transformers_saved_comes_out_the_same(tmp_path: Path, transformers_module: Any, changes: dict[str, Any]):
    """In bf16, with fp32 router biases, but for the MTP block, which transformers drops."""
    fields = dataclasses.asdict(tiny_config(**{"moe_shared_expert_intermediate_size": 12} | changes))
    fields["moe_shared_expert_intermediate_size"] = fields["moe_shared_expert_intermediate_size"] or 1
    torch.manual_seed(0)
    model = transformers_module.NemotronHForCausalLM(transformers_module.NemotronHConfig(**fields)).bfloat16()
    for layer in model.model.layers:
        if layer.block_type == "moe":
            layer.mixer.gate.e_score_correction_bias = 64 + torch.rand(8)
    model.save_pretrained(tmp_path / "theirs")
    written = write(tmp_path / "theirs", tmp_path / "ours")
    assert_same_tensors(stored_tensors(written), stored_tensors(tmp_path / "theirs"))
    _, info = transformers_module.AutoModelForCausalLM.from_pretrained(written, output_loading_info=True)
    assert not any(info.values()), info
    theirs, ours = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours"))
    ignored = {"transformers_version", "time_step_limit", "tie_word_embeddings"}
    ignored |= {"num_nextn_predict_layers", "mtp_layers_block_type"}
    assert {key: ours.get(key) for key in theirs if key not in ignored} == {
        key: value for key, value in theirs.items() if key not in ignored
    }


def test_bf16_is_what_the_open_checkpoints_have(tmp_path: Path):
    network = make_network(tiny_config())
    written = stored_tensors(write(write_fit_folder(tmp_path / "fit", network), tmp_path / "hf", "bf16"))
    for name, tensor in public_tensors(network).items():
        assert written[name].dtype == (torch.float32 if name.endswith(BIAS) else torch.bfloat16), name
        assert torch.equal(written[name], tensor.to(written[name].dtype)), name


def test_fp32_widens_bf16(tmp_path: Path):
    source = write_hf_folder(tmp_path / "source", make_network(tiny_config()), torch.bfloat16)
    written = write(source, tmp_path / "hf", "fp32")
    expected = {name: tensor.float() for name, tensor in stored_tensors(source).items()}
    assert_same_tensors(stored_tensors(written), expected)
    assert json.loads((written / "config.json").read_text())["dtype"] == "float32"


def test_the_config_serves_old_and_new_readers(tmp_path: Path, transformers_module: Any):
    network = make_network(tiny_config(mtp_hybrid_override_pattern="ME*-"))
    written = write(write_fit_folder(tmp_path / "fit", network), tmp_path / "hf")
    config = json.loads(
        (written / "config.json").read_text(), parse_constant=lambda word: pytest.fail(f"no JSON: {word}")
    )
    assert config["hybrid_override_pattern"] == "ME*-ME"
    assert config["mtp_hybrid_override_pattern"] == "ME*-"
    names = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
    assert config["layers_block_type"] == [names[letter] for letter in "ME*-ME"]
    assert config["mtp_layers_block_type"] == [names[letter] for letter in "ME*-"]
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["max_position_embeddings"] == 128, "the length it was trained on"
    theirs = transformers_module.AutoConfig.from_pretrained(written)
    assert theirs.mtp_layers_block_type == config["mtp_layers_block_type"]
    assert theirs.num_hidden_layers == config["num_hidden_layers"] == 6
    assert theirs.architectures == ["NemotronHForCausalLM"]


def test_what_a_source_says_beyond_the_network_travels_along(tmp_path: Path, transformers_module: Any):
    source = write_hf_folder(
        tmp_path / "source",
        make_network(tiny_config()),
        tokenizer=True,
        max_position_embeddings=262144,
        some_engine_hint={"a": [1]},
        auto_map={"AutoConfig": "configuration_nemotron_h.NemotronHConfig"},
    )
    generation = {"eos_token_id": [2, 11], "bos_token_id": 1, "pad_token_id": 0, "do_sample": True, "top_p": 0.95}
    (source / "generation_config.json").write_text(json.dumps(generation))
    (source / "configuration_nemotron_h.py").write_text("# never run\n")
    (source / "LICENSE").write_text("terms")
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: open\nextra: 1\n---\n# Source\n")
    written = write(source, tmp_path / "hf")
    config = json.loads((written / "config.json").read_text())
    assert config["max_position_embeddings"] == 262144
    assert config["some_engine_hint"] == {"a": [1]}
    assert config["auto_map"] == {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"}
    assert config["eos_token_id"] == 2, "its own, beside that of generation_config.json"
    assert config["time_step_min"] == 0.001, "what another's model was made with is not known"
    assert json.loads((written / "generation_config.json").read_text()) == generation
    assert transformers_module.GenerationConfig.from_pretrained(written).top_p == 0.95
    for file in ("configuration_nemotron_h.py", "LICENSE", "tokenizer.json", "chat_template.jinja"):
        assert (written / file).read_bytes() == (source / file).read_bytes()
    card = (written / "README.md").read_text()
    assert "license: other\nlicense_name: open\n---\n\n# hf\n" in card
    assert "extra" not in card
    (source / "configuration_nemotron_h.py").unlink()
    assert "auto_map" not in json.loads((write(source, tmp_path / "without") / "config.json").read_text())


def test_the_tokenizer_of_a_run_travels_along(tmp_path: Path, transformers_module: Any):
    network = make_network(tiny_config(vocab_size=288))
    written = write(write_fit_folder(tmp_path / "fit", network, tokenizer=True), tmp_path / "hf")
    tokenizer = transformers_module.AutoTokenizer.from_pretrained(written)
    text = "def f():\n    return 12"
    assert tokenizer(text)["input_ids"] == Tokenizer.load(tmp_path / "fit" / "tokenizer").encode(text)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"
    generation = transformers_module.GenerationConfig.from_pretrained(written)
    assert (generation.eos_token_id, generation.bos_token_id, generation.pad_token_id) == (2, 1, 0)
    config = json.loads((written / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"], config["pad_token_id"]) == (2, 1, 0)
    assert "python -m app chat hf" in (written / "README.md").read_text()


def test_nothing_is_made_up_where_there_is_no_tokenizer(tmp_path: Path):
    written = write(write_fit_folder(tmp_path / "fit", make_network(tiny_config())), tmp_path / "hf")
    config = json.loads((written / "config.json").read_text())
    assert [config[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")] == [None, None, None]
    assert json.loads((written / "generation_config.json").read_text()) == {}
    assert "AutoTokenizer" not in (written / "README.md").read_text()


def test_a_damaged_tokenizer_is_not_passed_on(tmp_path: Path):
    source = write_hf_folder(tmp_path / "source", make_network(tiny_config()), tokenizer=True)
    file = source / "tokenizer.json"
    file.write_text(file.read_text()[:-9])
    with pytest.raises(UserError, match=r"tokenizer\.json is not valid JSON"):
        export(open_model(source), tmp_path / "out", max_shard_bytes=10**9, report=print)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_card_states_the_facts_of_the_run(tmp_path: Path):
    network = make_network(tiny_config())
    card = (write(write_fit_folder(tmp_path / "fit", network), tmp_path / "hf") / "README.md").read_text()
    parts = count_parts(network)
    main = [count for part, count in parts.items() if part != "MTP"]
    for row in (
        f"| total | {sum(count.parameters for count in main):,} |",
        f"| total with the MTP block | {sum(count.parameters for count in parts.values()):,} |",
        f"| active per token | {sum(count.active for count in main):,} |",
        f"| router biases, beside these | {sum(count.biases for count in parts.values()):,} |",
        "| optimiser steps | 20 of 40 |",
        "| tokens (positions, padding included) | 10,240 |",
        "| data | corpus |",
        "| batch | 4 rows of 128 tokens |",
        "| AdamW | peak learning rate 0.005, betas (0.9, 0.95), weight decay 0.1 |",
        "| validation/loss (nats per token, next token only, held-out rows) | 4.2500 |",
    ):
        assert row in card, row
    assert "somewhere" not in card, "a path of the machine"
    assert card.startswith("---\nlibrary_name: transformers\n")


def test_a_card_of_a_tied_model_counts_the_matrix_once(tmp_path: Path):
    network = make_network(tiny_config(tie_word_embeddings=True))
    card = (write(write_fit_folder(tmp_path / "fit", network), tmp_path / "hf") / "README.md").read_text()
    main = [count for part, count in count_parts(network).items() if part != "MTP"]
    assert f"| total | {sum(count.parameters for count in main):,} |" in card
    assert f"| active per token | {sum(count.active for count in main):,} |" in card
