"""Quantised models survive writing, reading and changes of layout to the bit, and mean the numbers that they say."""

import json
import weakref
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from modules.checkpoints.card_quantized import LOST_EXPERTS, LOST_SCALES, misreading
from modules.checkpoints.export import export
from modules.checkpoints.layouts.compressed_tensors import COMPRESSED_TENSORS
from modules.checkpoints.layouts.modelopt import MODELOPT
from modules.checkpoints.load import load_model
from modules.checkpoints.merge import MergedSource
from modules.checkpoints.quantization import Quantization
from modules.checkpoints.source import open_model
from tests.modules.checkpoints.folders import public_tensors, stored_tensors, write_fit_folder
from tests.modules.checkpoints.quantized_folders import (
    LAYOUTS,
    SHARDS,
    W4A4,
    W4A16,
    W8A8,
    all_bytes,
    change_layout,
    choose,
    config,
    make_source,
    make_weight,
    mixed,
    naive_nvfp4,
    raw_bytes,
    silent,
    write_quantized,
    write_quantized_folder,
)
from tests.modules.helpers import dequantize_weight, make_network

CASES: dict[str, dict[str, Any]] = {
    "everything": {},
    "three experts": {"n_routed_experts": 3},
    "one expert": {"n_routed_experts": 1, "num_experts_per_tok": 1},
    "without MTP": {"num_nextn_predict_layers": 0},
    "tied head": {"tie_word_embeddings": True},
    "no latent": {"moe_latent_size": None},
    "no shared expert": {"moe_shared_expert_intermediate_size": 0},
    "another MTP block": {"mtp_hybrid_override_pattern": "ME*-"},
    "no mixture": {"hybrid_override_pattern": "M*-", "mtp_hybrid_override_pattern": "*"},
    "no attention": {"hybrid_override_pattern": "EM", "mtp_hybrid_override_pattern": "-"},
    "only attention": {"hybrid_override_pattern": "***", "num_nextn_predict_layers": 0},
    "odd widths": {"mamba_num_heads": 6, "n_groups": 3, "vocab_size": 67, "num_key_value_heads": 1, "conv_kernel": 3},
    "widths no block divides": {"moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 40},
}
CHOICES = {
    "W4A4": lambda name: W4A4,
    "W4A16": lambda name: W4A16,
    "FP8": lambda name: W8A8,
    "mixed": mixed,
    "every second": lambda name: (W4A4, None, W8A8)[sum(name.encode()) % 3],
}


@pytest.mark.parametrize(
    ("case", "choice"),
    [*((case, "mixed") for case in CASES), ("everything", "every second"), ("tied head", "every second")],
)
def test_all_bits_survive_all_layouts(tmp_path: Path, case: str, choice: str):
    source = make_source(tmp_path / "bf16", **CASES[case])
    quantized = choose(source, CHOICES[choice])
    first = write_quantized_folder(tmp_path / "modelopt", source, CHOICES[choice], limit=SHARDS)
    second, notes = change_layout(first, tmp_path / "compressed", "compressed-tensors")
    third, more = change_layout(second, tmp_path / "again", "modelopt", SHARDS)
    assert not [note for note in notes + more if "reciprocal" in note]
    assert all_bytes(third) == all_bytes(first)
    for name in ("config.json", "hf_quant_config.json", "generation_config.json"):
        before, after = (json.loads((folder / name).read_text()) for folder in (first, third))
        before.pop("tie_word_embeddings", None), after.pop("tie_word_embeddings", None)  # a written head is not tied
        assert after == before, name
    directly = write_quantized_folder(tmp_path / "directly", source, CHOICES[choice], "compressed-tensors")
    assert all_bytes(directly) == all_bytes(second)
    for path in (first, second):
        read = open_model(path)
        assert read.notes == []
        assert read.quantization is not None
        assert dict(read.quantization.weights) == quantized
        for name, layer in quantized.items():
            made = make_weight(source, name, layer)
            for field, stored in read.read_quantized(name)._asdict().items():
                expected = getattr(made, field)
                if isinstance(expected, torch.Tensor):
                    assert raw_bytes(stored) == raw_bytes(expected), (name, field)
                else:
                    assert stored == expected, (name, field)
            assert torch.equal(read.read(name), dequantize_weight(made)), name
        for name in source.tensors.keys() - quantized.keys():
            assert raw_bytes(read.read(name)) == raw_bytes(source.read(name)), name


@pytest.mark.parametrize("choice", ["W4A4", "W4A16", "FP8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_format_for_all_layers(tmp_path: Path, choice: str, layout: Any):
    """Heads, MTP blocks and the projections into it too, as no released model has it."""
    source = make_source(tmp_path / "bf16", hybrid_override_pattern="M*-E")
    written = write_quantized_folder(tmp_path / "q", source, CHOICES[choice], layout, kv=False)
    read = open_model(written)
    assert read.notes == []
    assert read.quantization is not None
    assert dict(read.quantization.weights) == choose(source, CHOICES[choice])
    assert "lm_head.weight" in read.quantization.weights
    assert read.quantization.kv_scales == {}
    back, _ = change_layout(written, tmp_path / "back", layout)
    assert all_bytes(back) == all_bytes(written)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_tensors_keep_their_dtype(tmp_path: Path, dtype: torch.dtype, layout: Any):
    source = make_source(tmp_path / "source", dtype)
    written = write_quantized_folder(tmp_path / "q", source, mixed, layout)
    stored = stored_tensors(written)
    plain = source.tensors.keys() - choose(source, mixed).keys()
    assert {stored[name].dtype for name in plain if "e_score" not in name} == {dtype}
    assert json.loads((written / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_a_checkpoint_of_fit_with_plain_tensors_in_bf16(tmp_path: Path):
    network = make_network(config())
    source = open_model(write_fit_folder(tmp_path / "fit", network, tokenizer=True))
    assert source.quantization is None
    written = write_quantized_folder(tmp_path / "q", source, mixed, dtype="bf16")
    quantized, stored = choose(source, mixed), stored_tensors(written)
    for name, tensor in public_tensors(network).items():
        if name not in quantized:
            expected = tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()
            assert raw_bytes(stored[name]) == raw_bytes(expected), name
    assert (written / "tokenizer.json").read_bytes() == (tmp_path / "fit" / "tokenizer" / "tokenizer.json").read_bytes()


def test_tensors_of_model_optimizer_mean_what_a_naive_reading_says(tmp_path: Path):
    source = make_source(tmp_path / "bf16")
    path = write_quantized_folder(tmp_path / "q", source, mixed)
    stored, read = stored_tensors(path), open_model(path)
    for name, layer in choose(source, mixed).items():
        module = name.removesuffix(".weight")
        if layer.format == "fp8":
            assert stored[name].dtype == torch.float8_e4m3fn
            assert stored[f"{module}.weight_scale"].shape == ()
            expected = stored[name].float() * stored[f"{module}.weight_scale"]
        else:
            fields = [stored[f"{module}.{field}"] for field in ("weight", "weight_scale", "weight_scale_2")]
            assert [field.dtype for field in fields] == [torch.uint8, torch.float8_e4m3fn, torch.float32]
            expected = naive_nvfp4(*fields)
        assert (f"{module}.input_scale" in stored) == layer.inputs
        assert torch.equal(read.read(name), expected), name
        error = (expected - source.read(name).float()).norm() / source.read(name).float().norm()
        assert error < 0.13, "NVFP4 keeps 9.5% of the norm as error"


def test_compressed_tensors_hold_reciprocals(tmp_path: Path):
    source = make_source(tmp_path / "bf16")
    first = stored_tensors(write_quantized_folder(tmp_path / "a", source, mixed))
    second = stored_tensors(write_quantized_folder(tmp_path / "b", source, mixed, "compressed-tensors"))
    module = "backbone.layers.1.mixer.experts.3.up_proj"
    assert torch.equal(second[f"{module}.weight_packed"], first[f"{module}.weight"])
    assert torch.equal(second[f"{module}.weight_global_scale"], 1 / first[f"{module}.weight_scale_2"].reshape(1))
    assert torch.equal(second[f"{module}.input_global_scale"], 1 / first[f"{module}.input_scale"].reshape(1))
    module = "backbone.layers.0.mixer.in_proj"
    assert torch.equal(second[f"{module}.input_scale"], first[f"{module}.input_scale"].reshape(1)), "FP8: no reciprocal"
    attention = "backbone.layers.2.mixer"
    assert torch.equal(second[f"{attention}.k_scale"], first[f"{attention}.k_proj.k_scale"].reshape(1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_plain_weights_of_a_quantised_model(tmp_path: Path, layout: Any, dtype: Any):
    """`hf`: the numbers the codes mean, in fp32 or rounded; the configuration names no quantisation any more."""
    source = make_source(tmp_path / "bf16")
    path = write_quantized_folder(tmp_path / "q", source, mixed, layout)
    export(open_model(path), tmp_path / "hf", dtype=dtype, max_shard_bytes=SHARDS, report=silent)
    stored, quantized = stored_tensors(tmp_path / "hf"), choose(source, mixed)
    assert stored.keys() == source.tensors.keys()
    for name, layer in quantized.items():
        means = dequantize_weight(make_weight(source, name, layer))
        assert raw_bytes(stored[name]) == raw_bytes(means if dtype == "auto" else means.bfloat16()), name
    for name in source.tensors.keys() - quantized.keys():
        assert raw_bytes(stored[name]) == raw_bytes(source.read(name)), name
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    assert not (tmp_path / "hf" / "hf_quant_config.json").exists()
    assert open_model(tmp_path / "hf").quantization is None


def test_plain_loading_and_merging_take_the_numbers_that_codes_mean(tmp_path: Path):
    source = make_source(tmp_path / "bf16")
    path = write_quantized_folder(tmp_path / "q", source, mixed, kv=False)
    export(open_model(path), tmp_path / "hf", max_shard_bytes=10**9, report=silent)
    networks = [load_model(folder, dtype="fp32").network for folder in (path, tmp_path / "hf")]
    for name, tensor in networks[0].state_dict().items():
        assert torch.equal(tensor, networks[1].state_dict()[name]), name
    merged = MergedSource([open_model(path), open_model(tmp_path / "bf16")], [1, 3], "A test.")
    assert merged.quantization is None
    assert any("averaged as the numbers they mean" in note for note in merged.notes)
    name = "backbone.layers.1.mixer.experts.0.up_proj.weight"
    expected = 0.25 * open_model(path).read(name) + 0.75 * source.read(name).float()
    torch.testing.assert_close(merged.read(name), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("choice", ["W4A4", "FP8", "mixed"])
def test_the_size_is_that_of_the_format(tmp_path: Path, layout: Any, choice: str):
    """Files within 2% of 4.5 bits (8 in FP8) per quantised weight and the plain tensors, where layers are not tiny."""
    wide = {"hidden_size": 512, "moe_latent_size": 256, "moe_intermediate_size": 512, "intermediate_size": 1024}
    wide |= {"moe_shared_expert_intermediate_size": 512, "mamba_num_heads": 16, "mamba_head_dim": 32, "n_groups": 4}
    source = make_source(tmp_path / "bf16", hybrid_override_pattern="ME*-", n_routed_experts=4, **wide)
    quantized = choose(source, CHOICES[choice])
    path = write_quantized_folder(tmp_path / "q", source, CHOICES[choice], layout)
    bits = {"nvfp4": 4.5, "fp8": 8}
    expected = sum(
        prod(info.shape) * (bits[quantized[name].format] / 8 if name in quantized else info.dtype.itemsize)
        for name, info in source.tensors.items()
    )
    assert sum(file.stat().st_size for file in path.glob("*.safetensors")) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("limit", [10**9, SHARDS], ids=["one file", "shards"])
def test_weights_are_made_one_at_a_time_and_in_order(tmp_path: Path, limit: int):
    source = make_source(tmp_path / "bf16")
    quantized, calls, made = choose(source, mixed), [], []

    def make(name: str):
        assert not [codes for codes in made if codes() is not None], "the one before is gone"
        weight = make_weight(source, name, quantized[name])
        calls.append(name)
        made.append(weakref.ref(weight.codes))
        return weight

    write_quantized(
        source, quantized, {}, make, tmp_path / "q", layout="modelopt", max_shard_bytes=limit, report=silent
    )
    assert calls == [name for name in source.tensors if name in quantized]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_left_of_an_export_that_fails(tmp_path: Path, layout: Any):
    source = make_source(tmp_path / "bf16")
    quantized = choose(source, mixed)

    def make(name: str):
        if "experts.5" in name:
            raise OSError(28, "No space left on device")
        return make_weight(source, name, quantized[name])

    with pytest.raises(OSError, match="No space left"):
        write_quantized(
            source, quantized, {}, make, tmp_path / "q", layout=layout, max_shard_bytes=SHARDS, report=silent
        )
    assert [path.name for path in tmp_path.iterdir()] == ["bf16"]


def test_a_report_travels_along(tmp_path: Path):
    source = make_source(tmp_path / "bf16")
    settings = {"default": "nvfp4", "search": "mse", "model": "/mine/secret", "texts": "/mine/texts"}
    before = {"nll": 2.5, "perplexity": 8.25, "bits_per_byte": 1.5, "more": 1.0}
    quality = {"before": before, "after": before | {"perplexity": 8.5}, "kl": 0.0125, "top1_agreement": 0.975}
    report = {"settings": settings, "quality": quality}
    path = write_quantized_folder(tmp_path / "q", source, mixed, about=report)
    assert json.loads((path / "quantization_report.json").read_text()) == report
    again, _ = change_layout(path, tmp_path / "again", "compressed-tensors")
    assert json.loads((again / "quantization_report.json").read_text()) == report
    for folder in (path, again):
        card = (folder / "README.md").read_text()
        for row in (
            "| `backbone.layers.*.mixer.experts.*.up_proj` | NVFP4 W4A4 (16) |",
            "| `backbone.layers.*.mixer.q_proj` | FP8 (1) |",
            "| `backbone.layers.*.mixer.out_proj` | NVFP4 W4A16 (2) |",
            "| `backbone.layers.*.mixer.fc1_latent_proj` | bfloat16 (2) |",
            "| perplexity before and after | 8.2500, 8.5000 |",
            "| KL(original, quantised), nats per token | 0.012500 |",
            "| block scales by | mse |",
            "| KV cache | FP8 with scales of 2 layers |",
        ):
            assert row in card, row
        places = [card.index(f"| {key} before and after") for key in ("nll", "perplexity", "bits per byte", "more")]
        assert places == sorted(places), "as in the report"
        assert "/mine" not in card, "a path of the machine"
    assert "transformers does not read this layout" in (path / "README.md").read_text()
    assert "which leaves out the global scales of routed experts in NVFP4" in (again / "README.md").read_text()
    (path / "quantization_report.json").write_text('{"settings": [3], "quality": {"before": 7, "kl": "low"}}')
    change_layout(path, tmp_path / "strange", "modelopt")


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ((W4A4, W4A4), LOST_SCALES),
        ((W4A4, W4A16), LOST_SCALES),
        ((W8A8, W8A8), None),
        ((W8A8, None), None),
        ((None, None), None),
        ((W4A4, None), LOST_EXPERTS),
        ((W4A4, W8A8), LOST_EXPERTS),
    ],
)
def test_what_transformers_misreads_goes_by_the_formats_of_routed_experts(kinds, expected: str | None):
    """Those of the MTP block, which it leaves out, do not count, nor do other layers."""
    names = [f"backbone.layers.{layer}.mixer.experts.0.up_proj" for layer in (1, 3)]
    found = {f"{name}.weight": kind for name, kind in zip(names, kinds, strict=True) if kind is not None}
    found |= {"mtp.layers.1.mixer.experts.0.up_proj.weight": W8A8, "backbone.layers.0.mixer.in_proj.weight": W8A8}
    plain = [name for name, kind in zip(names, kinds, strict=True) if kind is None]
    assert misreading(COMPRESSED_TENSORS, Quantization(found, {}), [*plain, "lm_head"]) == expected
    assert misreading(MODELOPT, Quantization(found, {}), plain) is None
