"""A damaged or unknown quantised folder is refused in one line that names the file, the tensor or key, and the mend."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modules.checkpoints.quantization import ModuleList
from modules.checkpoints.source import open_model
from modules.errors import UserError
from tests.modules.checkpoints.quantized_folders import SHARDS, make_source, mixed, write_quantized_folder

EXPERT = "backbone.layers.1.mixer.experts.3.up_proj"
MAMBA, QUERY, SHARED = (
    "backbone.layers.0.mixer.in_proj",
    "backbone.layers.2.mixer.q_proj",
    "backbone.layers.1.mixer.shared_experts.up_proj",
)
KEY = "backbone.layers.2.mixer.k_proj.k_scale"


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("quantized")
    source = make_source(root / "bf16")
    write_quantized_folder(root / "modelopt", source, mixed)
    write_quantized_folder(root / "compressed-tensors", source, mixed, "compressed-tensors")
    write_quantized_folder(root / "sharded", source, mixed, limit=SHARDS)
    return root


@pytest.fixture
def folder(originals, tmp_path, request) -> Path:
    return Path(shutil.copytree(originals / getattr(request, "param", "modelopt"), tmp_path / "model"))


def read_all(path: Path) -> None:
    source = open_model(path)
    for name in source.tensors:
        source.read(name)


def message(path: Path) -> str:
    """Of opening the folder and reading all of it."""
    with pytest.raises(UserError, match=r".") as caught:
        read_all(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    assert len(text.replace(str(path), "")) < 400
    return text.replace(str(path), "PATH")


def edit_tensors(path: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def edit_json(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_settings(path: Path, change: Callable[[dict], object]) -> None:
    """Change `quantization_config`, the only configuration that stays."""
    (path / "hf_quant_config.json").unlink(missing_ok=True)
    edit_json(path / "config.json", lambda raw: change(raw["quantization_config"]))


def test_the_originals_are_sound(originals):
    for layout in ("modelopt", "compressed-tensors", "sharded"):
        source = open_model(originals / layout)
        assert source.notes == []
        for name in source.tensors:
            source.read(name)


# -- tensors -----------------------------------------------------------------------------------------------------------

SUFFIXES = [
    *((EXPERT, suffix) for suffix in ("weight", "weight_scale", "weight_scale_2")),
    *((MAMBA, suffix) for suffix in ("weight", "weight_scale", "input_scale")),
]


@pytest.mark.parametrize(("module", "suffix"), SUFFIXES)
def test_missing_tensor(folder, module, suffix):
    edit_tensors(folder, lambda tensors: tensors.pop(f"{module}.{suffix}"))
    text = message(folder)
    assert text.startswith("PATH/model.safetensors: ")
    assert f"{module}.{suffix}" in text


def test_missing_scale_of_inputs(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(f"{EXPERT}.input_scale"))
    answer = f"says that {EXPERT} is NVFP4 W4A4, but its tensors are NVFP4 W4A16 (there is no scale of its inputs)"
    assert answer in message(folder)


@pytest.mark.parametrize("folder", ["compressed-tensors"], indirect=True)
@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_global_scale"])
def test_missing_tensor_of_compressed_tensors(folder, suffix):
    edit_tensors(folder, lambda tensors: tensors.pop(f"{EXPERT}.{suffix}"))
    assert f"{EXPERT}.{suffix}" in message(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn, torch.int64])
@pytest.mark.parametrize(("module", "suffix"), SUFFIXES)
def test_swapped_dtype(folder, module, suffix, dtype):
    name = f"{module}.{suffix}"
    scalar = load_file(folder / "model.safetensors")[name].dtype == torch.float32
    if load_file(folder / "model.safetensors")[name].dtype == dtype or (scalar and dtype == torch.bfloat16):
        return  # as it is; or a scale in bf16, which is one

    def change(tensors):
        tensors[name] = tensors[name].float().to(dtype)

    edit_tensors(folder, change)
    text = message(folder)
    assert text.startswith("PATH/model.safetensors: ")
    assert module in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0])
@pytest.mark.parametrize("name", [f"{EXPERT}.weight_scale_2", f"{EXPERT}.input_scale", f"{QUERY}.weight_scale", KEY])
def test_scale_that_is_none(folder, name, value):
    edit_tensors(folder, lambda tensors: tensors[name].fill_(value))
    text = message(folder)
    assert text.startswith(f"PATH/model.safetensors: tensor {name} holds ")
    assert "take another checkpoint of it" in text


@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_block_scale_that_is_none(folder, value):
    def change(tensors):
        scales = tensors[f"{EXPERT}.weight_scale"].float()
        scales[3, 0] = value
        tensors[f"{EXPERT}.weight_scale"] = scales.to(torch.float8_e4m3fn)

    edit_tensors(folder, change)
    assert message(folder).startswith(f"PATH/model.safetensors: tensor {EXPERT}.weight_scale holds ")


def test_fp8_code_that_is_no_number(folder):
    def change(tensors):
        tensors[f"{MAMBA}.weight"].view(torch.uint8)[2, 5] = 0x7F

    edit_tensors(folder, change)
    assert message(folder).startswith(f"PATH/model.safetensors: tensor {MAMBA}.weight holds 1 values")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (f"{EXPERT}.weight", (32, 12)),
        (f"{EXPERT}.weight", (512,)),
        (f"{EXPERT}.weight", ()),
        (f"{EXPERT}.weight", (31, 8)),
        (f"{EXPERT}.weight", (2, 16, 8)),
        (f"{EXPERT}.weight_scale", (1, 32)),
        (f"{EXPERT}.weight_scale_2", (2,)),
        (f"{MAMBA}.weight", (32, 168)),
        (f"{MAMBA}.weight_scale", (168, 1)),
        (KEY, (2,)),
    ],
)
def test_wrong_shape(folder, name, shape):
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(shape).to(tensors[name].dtype)}))
    text = message(folder)
    assert text.startswith("PATH/model.safetensors: ")
    assert name.rpartition(".")[0] in text


@pytest.mark.parametrize(
    ("name", "tensor", "answer"),
    [
        (f"{MAMBA}.weight_scale_2", torch.ones(()), "does not belong beside weight in float8_e4m3fn"),
        (f"{EXPERT}.weight_scale_inv", torch.ones(2, 2), "quantised weights of this kind cannot be read"),
        (f"{EXPERT}.pre_quant_scale", torch.ones(16), "quantised weights of this kind cannot be read"),
        (f"{EXPERT}.weight_packed", torch.ones(2, 2).to(torch.uint8), "has no such tensor of a quantised layer"),
        (
            "backbone.layers.1.mixer.gate.weight",
            torch.ones(8, 32).to(torch.float8_e4m3fn),
            "routers and embeddings apart",
        ),
        ("backbone.layers.0.mixer.A_log", torch.ones(8).to(torch.uint8), "has no such tensor of a quantised layer"),
        (
            "backbone.layers.1.mixer.k_scale",
            torch.ones(()),
            "is the scale of a KV cache, but modelopt has none of this",
        ),
        ("model.layers.0.norm.weight", torch.ones(32), "is there under two names"),
    ],
)
def test_tensor_that_does_not_belong(folder, name, tensor, answer):
    edit_tensors(folder, lambda tensors: tensors.update({name: tensor}))
    text = message(folder)
    assert text.startswith("PATH/model.safetensors: ")
    assert answer in text


@pytest.mark.parametrize("folder", ["sharded"], indirect=True)
@pytest.mark.parametrize("kept", [0.99, 0.5, 0.0])
def test_shard_cut_short(folder, kept):
    file = sorted(folder.glob("*.safetensors"))[-1]
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    assert "copy or download the file again" in message(folder)


@pytest.mark.parametrize("folder", ["sharded"], indirect=True)
def test_missing_shard(folder):
    sorted(folder.glob("*.safetensors"))[2].unlink()
    assert "is missing, though model.safetensors.index.json names it" in message(folder)


# -- configuration -----------------------------------------------------------------------------------------------------


def test_quantised_tensors_without_a_configuration(folder):
    (folder / "hf_quant_config.json").unlink()
    edit_json(folder / "config.json", lambda raw: raw.pop("quantization_config"))
    assert "no configuration says that the model is quantised: download its JSON files too" in message(folder)


def test_plain_tensors_with_a_configuration(folder, originals):
    shutil.copy(originals / "bf16" / "model.safetensors", folder)
    text = message(folder)
    assert "says that weights are quantised, but no tensor is" in text


METHODS: list[tuple[dict[str, Any], str]] = [
    *(
        ({"quant_method": method}, f"quant_method '{method}'")
        for method in ("awq", "gptq", "fp8", "mxfp4", "bitsandbytes")
    ),
    ({"quant_method": 4}, "quant_method 4"),
    ({}, "quant_method None"),
    *(
        ({"quant_method": "modelopt", "quant_algo": name}, f"quant_algo '{name}'")
        for name in ("W4A16_AWQ", "NVFP4_AWQ", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8", "W4A8_NVFP4_FP8")
    ),
    ({"quant_method": "modelopt", "quant_algo": ["NVFP4"]}, "quant_algo ['NVFP4']"),
    ({"quant_method": "modelopt"}, "quant_algo None"),
    ({"quant_algo": "NVFP4", "group_size": 32}, "group_size 32 is not NVFP4's"),
    ({"quant_algo": "NVFP4", "kv_cache_scheme": "NVFP4"}, "a KV cache in 'NVFP4' cannot be read"),
    ({"quant_algo": "NVFP4", "kv_cache_scheme": {"num_bits": 4}}, "a KV cache in {'num_bits': 4} cannot be read"),
    ({"quant_algo": "NVFP4", "ignore": "lm_head"}, "modules that are not quantised is damaged"),
    ({"quant_algo": "NVFP4", "ignore": [3]}, "modules that are not quantised is damaged"),
    ({"quant_algo": "MIXED_PRECISION"}, "needs quantized_layers"),
    ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": 3}}, "needs quantized_layers"),
    ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "W8A16"}}}, "'W8A16' of a cannot be"),
    ({"quantization": [3], "quant_method": "modelopt"}, "quantization must be an object"),
]


@pytest.mark.parametrize(("settings", "answer"), METHODS, ids=[answer for _, answer in METHODS])
def test_methods_that_cannot_be_read(folder, settings, answer):
    (folder / "hf_quant_config.json").unlink()
    edit_json(folder / "config.json", lambda raw: raw.update(quantization_config=settings))
    text = message(folder)
    assert text.startswith("PATH/config.json: quantization_config")
    assert answer in text


def arguments(**changes) -> Callable[[dict], object]:
    return lambda about: about["config_groups"]["group_0"]["weights"].update(changes)


COMPRESSED: list[tuple[Callable[[dict], object], str]] = [
    *((lambda about, name=name: about.update(format=name), f"format '{name}' cannot be read") for name in (
        "pack-quantized", "int-quantized", "mxfp4-pack-quantized", "marlin-24", "sparse-bitmask")),
    (lambda about: about.update(config_groups={}), "config_groups must say what is quantised"),
    (lambda about: about.update(config_groups=[1]), "config_groups must say what is quantised"),
    (lambda about: about.update(config_groups={"W4A16": ["Linear"]}), "only NVFP4, NVFP4A16, FP8 are known by name"),
    (lambda about: about.update(config_groups={"group_0": 3}), "only NVFP4, NVFP4A16, FP8 are known by name"),
    (arguments(type="int"), "which alone can be read"),
    (arguments(group_size=32), "which alone can be read"),
    (arguments(symmetric=False), "which alone can be read"),
    (arguments(num_bits=8, strategy="channel", group_size=None), "which alone can be read"),
    (lambda about: about["config_groups"]["group_0"]["input_activations"].update(dynamic=True), "alone can be read"),
    (lambda about: about["config_groups"]["group_0"].update(output_activations={"num_bits": 8}), "alone can be read"),
    (lambda about: about["config_groups"]["group_0"].update(weights=[3]), "damaged"),
    (lambda about: about["config_groups"]["group_0"].pop("targets"), "targets or ignore are damaged"),
    (lambda about: about["config_groups"]["group_0"].update(targets=[3]), "targets or ignore are damaged"),
    (lambda about: about.update(ignore=["re:("]), "targets or ignore are damaged"),
    (lambda about: about.update(ignore=3), "targets or ignore are damaged"),
    (lambda about: about.update(transform_config={"a": 1}), "transform_config cannot be applied here"),
    (lambda about: about.update(kv_cache_scheme={"num_bits": 8, "type": "int"}), "a KV cache in"),
    (lambda about: about.update(kv_cache_scheme=None), "says nothing of an FP8 KV cache, but the weight files hold"),
]  # fmt: skip


@pytest.mark.parametrize("folder", ["compressed-tensors"], indirect=True)
@pytest.mark.parametrize(
    ("change", "answer"), COMPRESSED, ids=[f"{n} {answer}" for n, (_, answer) in enumerate(COMPRESSED)]
)
def test_configurations_of_compressed_tensors_that_cannot_be_read(folder, change, answer):
    edit_settings(folder, change)
    text = message(folder)
    assert text.startswith("PATH/config.json: quantization_config")
    assert answer in text


def relabel(about: dict, module: str, algorithm: str) -> None:
    about["quantized_layers"][module] = {"quant_algo": algorithm}


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        (lambda about: relabel(about, EXPERT, "FP8"), f"{EXPERT} is FP8, but its tensors are NVFP4 W4A4"),
        (lambda about: relabel(about, QUERY, "NVFP4"), f"{QUERY} is NVFP4 W4A4, but its tensors are FP8"),
        (
            lambda about: relabel(about, EXPERT, "W4A16_NVFP4"),
            f"{EXPERT} is NVFP4 W4A16, but its tensors are NVFP4 W4A4",
        ),
        (lambda about: about["quantized_layers"].pop(SHARED), f"{SHARED} is not quantised, but its tensors are NVFP4"),
        (lambda about: about["ignore"].append(QUERY), f"{QUERY} is not quantised, but its tensors are FP8"),
        (lambda about: about["ignore"].append("*.mixer.q_proj"), f"{QUERY} is not quantised"),
        (lambda about: about["ignore"].append("model.layers.2*"), f"{QUERY} is not quantised"),
        (
            lambda about: about.pop("kv_cache_scheme"),
            "says nothing of an FP8 KV cache, but the weight files hold scales",
        ),
        (lambda about: about.update(quant_algo="NVFP4"), f"{MAMBA} is NVFP4 W4A4, but its tensors are FP8"),
    ],
)
@pytest.mark.parametrize("place", ["config.json", "hf_quant_config.json"])
def test_configuration_that_contradicts_the_tensors(folder, change, answer, place):
    if place == "config.json":
        edit_json(folder / "config.json", lambda raw: change(raw["quantization_config"]))
    else:

        def nested(raw: dict) -> None:
            about = raw["quantization"]
            about["ignore"] = about["exclude_modules"]
            about["kv_cache_scheme"] = about.pop("kv_cache_quant_algo")
            change(about)

        edit_json(folder / "hf_quant_config.json", nested)
    text = message(folder)
    assert f"PATH/{place}" in text
    assert answer in text


def test_plain_layers_that_no_list_names(folder):
    """Not wrong, but engines take them for quantised: a note."""

    def change(about: dict) -> None:
        about["quantized_layers"]["lm_head"] = {"quant_algo": "NVFP4", "group_size": 16}
        about["ignore"].remove("lm_head")

    edit_settings(folder, change)
    notes = open_model(folder).notes
    assert len(notes) == 1
    assert "does not say that 1 plain weights are plain (first lm_head.weight)" in notes[0]


def test_two_layouts_in_a_folder(folder, originals):
    shutil.copy(originals / "compressed-tensors" / "config.json", folder)
    assert "is of compressed-tensors, but PATH/hf_quant_config.json of Model Optimizer" in message(folder)


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantization_report.json"])
@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000])
def test_file_that_is_no_json(folder, name, content):
    (folder / name).write_text(content)
    assert message(folder).startswith(f"PATH/{name} ")


@pytest.mark.parametrize("settings", [3, [], "NVFP4"])
def test_settings_that_are_no_object(folder, settings):
    edit_json(folder / "config.json", lambda raw: raw.update(quantization_config=settings))
    assert message(folder).startswith("PATH/config.json: quantization_config is damaged")


@pytest.mark.parametrize(
    ("entries", "module", "expected"),
    [
        (["backbone.layers.1.mixer"], "backbone.layers.1.mixer.q_proj", True),
        (["model.layers.1.mixer.q_proj"], "backbone.layers.1.mixer.q_proj", True),
        (["backbone.layers.1"], "backbone.layers.11.mixer.q_proj", False),
        (["backbone.layers.1*"], "backbone.layers.11.mixer.q_proj", False),
        (["backbone.layers.1*"], "backbone.layers.1.mixer.q_proj", True),
        (["mtp*"], "mtp.layers.0.mixer.q_proj", True),
        (["mtp*"], "backbone.mtps.0.q_proj", False),
        (["*.mixer.gate"], "backbone.layers.3.mixer.gate", True),
        (["*.mixer.gate"], "backbone.layers.3.mixer.gates", False),
        (["*lm_head*"], "lm_head", True),
        (["backbone.layers.[02].*"], "backbone.layers.2.mixer.q_proj", True),
        (["re:.*q_proj"], "backbone.layers.2.mixer.q_proj", True),
        (["re:model.layers"], "backbone.layers.2.mixer.q_proj", True),
        (["re:q_proj"], "backbone.layers.2.mixer.q_proj", False),
        ([], "lm_head", False),
    ],
)
def test_lists_of_modules(entries, module, expected):
    assert (module in ModuleList(entries)) == expected
