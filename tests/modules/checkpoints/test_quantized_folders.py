"""Quantised models survive writing, reading and changes of layout to the bit, and mean the numbers that they say."""

import dataclasses
import json
import weakref
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modules.checkpoints.card_quantized import LOST_EXPERTS, LOST_SCALES, misreading
from modules.checkpoints.export import convert, export, write_quantized
from modules.checkpoints.layouts.compressed_tensors import COMPRESSED_TENSORS
from modules.checkpoints.layouts.modelopt import MODELOPT
from modules.checkpoints.load import load_model
from modules.checkpoints.merge import MergedSource
from modules.checkpoints.quantization import Quantization
from modules.checkpoints.source import open_model
from modules.precision.quantized import tensor_scale
from tests.modules.checkpoints.folders import public_tensors, stored_tensors, write_fit_folder, write_hf_folder
from tests.modules.checkpoints.quantized_folders import (
    SHARDS,
    W4A4,
    W4A16,
    W8A8,
    all_bytes,
    choose,
    config,
    make_source,
    make_weight,
    mixed,
    naive_nvfp4,
    raw_bytes,
    write_quantized_folder,
)
from tests.modules.helpers import dequantize_weight, make_network

LAYOUTS = ("modelopt", "compressed-tensors")
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


def silent(line: str) -> None:
    pass


def change_layout(source: Path, target: Path, layout: Any, limit: int = 10**9) -> tuple[Path, list[str]]:
    lines: list[str] = []
    convert(open_model(source), target, layout=layout, max_shard_bytes=limit, report=lines.append)
    return target, [line for line in lines if line.startswith("note")]


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


def test_reports_and_documents_travel_along(tmp_path: Path):
    source = make_source(tmp_path / "bf16")
    settings = {"default": "nvfp4", "search": "mse", "model": "/mine/secret", "texts": "/mine/texts"}
    before = {"nll": 2.5, "perplexity": 8.25, "bits_per_byte": 1.5, "more": 1.0}
    quality = {"before": before, "after": before | {"perplexity": 8.5}, "kl": 0.0125, "top1_agreement": 0.975}
    report = {"settings": settings, "quality": quality}
    path = write_quantized_folder(
        tmp_path / "q", source, mixed, documents=lambda _: {"quantization_report.json": report, "more.json": {"a": 1}}
    )
    assert json.loads((path / "more.json").read_text()) == {"a": 1}
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


# -- models of other programs ------------------------------------------------------------------------------------------


def spoil_scales(path: Path, suffix: str) -> None:
    """Give NVFP4 scales all 24 bits, as other programs do."""
    tensors = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith(suffix):
            tensors[name] = tensor * (1 + torch.rand(tensor.shape, generator=generator) / 1000)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    ("layout", "suffix"), [("modelopt", "weight_scale_2"), ("compressed-tensors", "weight_global_scale")]
)
def test_scales_of_other_programs(tmp_path: Path, layout: Any, suffix: str):
    """Their own layout keeps every bit; the other one cannot, and says so; the numbers are those of the own library."""
    source = make_source(tmp_path / "bf16")
    path = write_quantized_folder(
        tmp_path / "q", source, lambda name: W4A4 if "layers.1.mixer.experts" in name else None, layout
    )
    spoil_scales(path, suffix)
    same, notes = change_layout(path, tmp_path / "same", layout)
    assert all_bytes(same) == all_bytes(path)
    assert not [note for note in notes if "reciprocal" in note]
    other, notes = change_layout(path, tmp_path / "other", LAYOUTS[layout == "modelopt"])
    assert any("have a scale without an exact reciprocal" in note for note in notes)
    stored = stored_tensors(path)
    for name in open_model(path).quantization.weights:  # type: ignore[union-attr]
        module = name.removesuffix(".weight")
        codes = stored[f"{module}.{'weight' if layout == 'modelopt' else 'weight_packed'}"]
        blocks, scale = stored[f"{module}.weight_scale"], stored[f"{module}.{suffix}"].reshape(())
        if layout == "modelopt":
            expected = naive_nvfp4(codes, blocks, scale)
        else:
            unscaled = naive_nvfp4(codes, torch.ones_like(blocks), torch.tensor(1.0))
            expected = unscaled * (blocks.float() / scale).repeat_interleave(16, dim=-1)
        assert torch.equal(open_model(path).read(name), expected), name
        torch.testing.assert_close(open_model(other).read(name), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("keep", ["config.json", "hf_quant_config.json", "both"])
def test_the_configuration_may_be_in_either_file(tmp_path: Path, keep: str):
    source = make_source(tmp_path / "bf16")
    path = write_quantized_folder(tmp_path / "q", source, mixed)
    expected = open_model(path).quantization
    if keep == "config.json":
        (path / "hf_quant_config.json").unlink()
    elif keep == "hf_quant_config.json":
        raw = json.loads((path / "config.json").read_text())
        del raw["quantization_config"]
        (path / "config.json").write_text(json.dumps(raw))
    assert open_model(path).quantization == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_as_in_memory(tmp_path: Path, layout: Any):
    """Tools that save from transformers write `model.`, in tensors and lists."""
    source = make_source(tmp_path / "bf16")
    path = write_quantized_folder(tmp_path / "q", source, mixed, layout)
    expected = all_bytes(path)
    tensors = load_file(path / "model.safetensors")
    save_file(
        {name.replace("backbone.", "model."): tensor for name, tensor in tensors.items()}, path / "model.safetensors"
    )
    for name in ("config.json", "hf_quant_config.json"):
        if (path / name).exists():
            (path / name).write_text((path / name).read_text().replace("backbone.", "model."))
    assert open_model(path).notes == []
    back, _ = change_layout(path, tmp_path / "back", layout)
    assert all_bytes(back) == expected


def test_lists_as_the_released_models_have_them(tmp_path: Path):
    """Each expert by itself or a container for all, wildcards, and modules that no network here has."""
    source = make_source(tmp_path / "bf16")
    path = write_quantized_folder(tmp_path / "q", source, mixed)
    file, raw = path / "hf_quant_config.json", json.loads((path / "config.json").read_text())
    settings = json.loads(file.read_text())["quantization"]
    assert settings["quant_algo"] == raw["quantization_config"]["quant_algo"] == "MIXED_PRECISION"
    assert settings["kv_cache_quant_algo"] == "FP8"
    layers = settings["quantized_layers"]
    assert layers["backbone.layers.1.mixer.experts.7.down_proj"] == {"quant_algo": "NVFP4", "group_size": 16}
    assert layers["backbone.layers.0.mixer.out_proj"] == {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    assert layers["backbone.layers.2.mixer.q_proj"] == {"quant_algo": "FP8"}
    excluded = settings["exclude_modules"]
    assert excluded == raw["quantization_config"]["ignore"]
    for module in ("lm_head", "backbone.layers.1.mixer.gate", "backbone.layers.0.mixer.conv1d", "backbone.embeddings"):
        assert module in excluded
    assert "mtp*" in excluded
    for name in [name for name in layers if ".experts." in name]:
        del layers[name]
    layers["model.layers.1.mixer.experts"] = layers["backbone.layers.5.mixer.experts.*"] = {
        "quant_algo": "nvfp4",
        "group_size": 16,
    }
    settings["exclude_modules"] = ["lm_head", "mtp*", "*.mixer.gate", "backbone.layers.*.mixer.conv1d", "vision_tower*"]
    file.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": settings}))
    assert open_model(path).notes == []
    del raw["quantization_config"]["quantized_layers"]
    (path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"config\.json: quantization_config: MIXED_PRECISION needs quantized_layers"):
        open_model(path)


def test_plain_experts_are_one_entry(tmp_path: Path):
    source = make_source(tmp_path / "bf16")
    only_mamba = lambda name: W4A4 if "in_proj" in name or "out_proj" in name else None  # noqa: E731
    path = write_quantized_folder(tmp_path / "q", source, only_mamba)
    settings = json.loads((path / "hf_quant_config.json").read_text())["quantization"]
    assert settings["quant_algo"] == "NVFP4"
    assert "quantized_layers" not in settings
    assert "backbone.layers.1.mixer.experts*" in settings["exclude_modules"]
    assert not [name for name in settings["exclude_modules"] if ".experts." in name]
    assert open_model(path).notes == []


def test_the_configuration_of_compressed_tensors(tmp_path: Path):
    source = make_source(tmp_path / "bf16")
    about = json.loads(
        (write_quantized_folder(tmp_path / "q", source, mixed, "compressed-tensors") / "config.json").read_text()
    )["quantization_config"]
    assert about["format"] == "mixed-precision"
    groups = about["config_groups"]
    assert groups["group_0"]["targets"] == ["Linear"]
    assert groups["group_0"]["format"] == "nvfp4-pack-quantized"
    assert groups["group_0"]["input_activations"]["dynamic"] == "local"
    eight = next(group for group in groups.values() if group["format"] == "float-quantized")
    assert {"backbone.layers.2.mixer.q_proj", "model.layers.2.mixer.q_proj"} <= set(eight["targets"])
    assert {"lm_head", "model.layers.1.mixer.gate", "backbone.layers.1.mixer.gate"} <= set(about["ignore"])


def test_presets_and_patterns_of_compressed_tensors(tmp_path: Path):
    source = make_source(tmp_path / "bf16", num_nextn_predict_layers=0)
    experts = lambda name: W4A4 if ".experts." in name else None  # noqa: E731
    path = write_quantized_folder(tmp_path / "q", source, experts, "compressed-tensors", kv=False)
    raw = json.loads((path / "config.json").read_text())
    raw["quantization_config"]["config_groups"] = {"NVFP4": ["re:.*experts\\.\\d+\\..*"]}
    raw["quantization_config"]["ignore"] = ["lm_head"]
    (path / "config.json").write_text(json.dumps(raw))
    read = open_model(path)
    assert read.notes == []
    assert read.quantization is not None
    assert dict(read.quantization.weights) == choose(source, experts)


@pytest.mark.parametrize("held", ["none", "one of two"])
def test_caches_without_scales_have_one(tmp_path: Path, held: str):
    source = make_source(tmp_path / "bf16")
    path = write_quantized_folder(tmp_path / "q", source, mixed)
    tensors = load_file(path / "model.safetensors")
    dropped = [name for name in tensors if name.endswith(".v_scale") or (held == "none" and name.endswith(".k_scale"))]
    save_file({name: tensor for name, tensor in tensors.items() if name not in dropped}, path / "model.safetensors")
    read = open_model(path)
    assert read.quantization is not None
    assert [scales[1] for scales in read.quantization.kv_scales.values()] == [1.0, 1.0]
    assert ([scales[0] for scales in read.quantization.kv_scales.values()] == [1.0, 1.0]) == (held == "none")
    assert len(read.notes) == 1
    assert f"{len(dropped)} of its 4 scales are not there" in read.notes[0]


def test_a_cache_alone(tmp_path: Path):
    source = make_source(tmp_path / "bf16")
    path = write_quantized_folder(tmp_path / "q", source, mixed)
    export(open_model(path), tmp_path / "hf", max_shard_bytes=10**9, report=silent)
    about = {"quant_algo": None, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    (tmp_path / "hf" / "hf_quant_config.json").write_text(json.dumps({"quantization": about}))
    read = open_model(tmp_path / "hf")
    assert read.quantization is not None
    assert not read.quantization.weights
    assert len(read.quantization.kv_scales) == 2


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (
            "backbone.layers.2.mixer.k_proj.weight_scale",
            "scales of weights and inputs of q_proj, k_proj, v_proj differ",
        ),
        ("backbone.layers.2.mixer.v_proj.input_scale", "scales of weights and inputs of q_proj, k_proj, v_proj differ"),
        ("backbone.layers.5.mixer.experts.6.up_proj.input_scale", "scales of inputs of a layer's experts differ"),
    ],
)
def test_fused_layers_that_engines_would_change(tmp_path: Path, name: str, what: str):
    source = make_source(tmp_path / "bf16")
    path = write_quantized_folder(tmp_path / "q", source, mixed)
    assert open_model(path).notes == []
    tensors = load_file(path / "model.safetensors")
    tensors[name] = tensor_scale(tensors[name] * 500, "fp8")
    save_file(tensors, path / "model.safetensors")
    notes = open_model(path).notes
    assert len(notes) == 1
    assert what in notes[0]
    assert ".".join(name.split(".")[:3]) in notes[0]


def test_expert_weights_may_have_scales_of_their_own(tmp_path: Path):
    source = make_source(tmp_path / "bf16")
    stored = stored_tensors(write_quantized_folder(tmp_path / "q", source, mixed))
    scales = {stored[f"backbone.layers.1.mixer.experts.{n}.up_proj.weight_scale_2"].item() for n in range(8)}
    assert len(scales) == 8
    assert open_model(tmp_path / "q").notes == []


def test_the_folder_of_the_source_does_not_matter(tmp_path: Path):
    """Placeholders for transformers, the card and keys of config.json are as a plain export writes them."""
    fields = dataclasses.asdict(config(moe_shared_expert_intermediate_size=0, tie_word_embeddings=True))
    network = make_network(config(moe_shared_expert_intermediate_size=0, tie_word_embeddings=True))
    source = open_model(
        write_hf_folder(tmp_path / "bf16", network, torch.bfloat16, some_key={"a": [1]}, n_shared_experts=0)
    )
    assert fields["moe_shared_expert_intermediate_size"] == 0
    export(source, tmp_path / "plain", max_shard_bytes=10**9, report=silent)
    path = write_quantized_folder(tmp_path / "q", source, mixed)
    plain, quantized = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "q"))
    settings = quantized.pop("quantization_config")
    assert plain == quantized
    placeholders = stored_tensors(tmp_path / "plain").keys() - source.tensors.keys()
    assert "lm_head.weight" in placeholders
    assert len(placeholders) > 1
    assert placeholders <= stored_tensors(path).keys()
    for name in placeholders - {name for name in placeholders if name.startswith("mtp.")}:
        assert name.removesuffix(".weight") in settings["ignore"]
