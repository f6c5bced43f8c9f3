"""Quantised folders of other programs: where their configuration stands, how it names layers, what it leaves open."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modules.checkpoints.export import export
from modules.checkpoints.source import open_model
from modules.errors import UserError
from modules.precision.quantized import tensor_scale
from tests.modules.checkpoints.folders import stored_tensors, write_hf_folder
from tests.modules.checkpoints.quantized_folders import (
    LAYOUTS,
    W4A4,
    all_bytes,
    change_layout,
    choose,
    config,
    make_source,
    mixed,
    naive_nvfp4,
    silent,
    write_quantized_folder,
)
from tests.modules.helpers import make_network


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
    with pytest.raises(UserError, match=r"config\.json: quantization_config: MIXED_PRECISION needs quantized_layers"):
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
