"""Model Optimizer's layout: what the released NVFP4 checkpoints have, and what vLLM, SGLang and TensorRT-LLM read.

The configuration is in two places: `hf_quant_config.json` (older readers), and `quantization_config` in config.json
(since 0.31), flattened. Sources: Model Optimizer 0.47, export/quant_utils.py (`process_layer_quant_config`) and
export/convert_hf_config.py; vLLM, model_executor/layers/quantization/modelopt.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from modules.checkpoints.config import shown
from modules.checkpoints.names import MTP, STACKED
from modules.checkpoints.quantization import (
    FP8_PARTS,
    LayerQuantization,
    Layout,
    ModuleList,
    Quantization,
    Settings,
    Stored,
    is_fp8_cache,
    module_of,
)
from modules.errors import UserError
from modules.precision.blocks import BLOCK

FILE = "hf_quant_config.json"
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
"""Engines know the layout by this name; the version is the one whose files these are made after."""
MIXED = "MIXED_PRECISION"
ALGORITHMS = {
    "NVFP4": LayerQuantization("nvfp4", inputs=True),
    "W4A16_NVFP4": LayerQuantization("nvfp4", inputs=False),
    "FP8": LayerQuantization("fp8", inputs=True),
}
_NAMES = {layer: name for name, layer in ALGORITHMS.items()}
_FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}
_NVFP4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}


def settings(document: Mapping[str, Any], place: str) -> Settings:
    """Return what a configuration says.

    Args:
        document: hf_quant_config.json, or `quantization_config` of config.json.
        place: where it was read, for messages.

    Raises:
        UserError: it is damaged, or names another algorithm than NVFP4, W4A16_NVFP4, FP8 and mixtures of these.
    """
    inner = document.get("quantization", document)
    if not isinstance(inner, dict):
        raise UserError(f"{place}: quantization must be an object; copy or download the file again")
    excluded = inner.get("exclude_modules", inner.get("ignore")) or []
    if not isinstance(excluded, list) or not all(isinstance(name, str) for name in excluded):
        raise UserError(f"{place}: the list of modules that are not quantised is damaged; copy or download it again")
    plain = ModuleList(name for name in excluded)
    kv = is_fp8_cache(inner.get("kv_cache_quant_algo", inner.get("kv_cache_scheme")), place)
    algorithm = inner.get("quant_algo")
    if algorithm is None and kv:  # nothing but the cache
        return Settings(lambda module: None, kv, place)
    if str(algorithm).upper() != MIXED:
        layer = _layer(inner, place)
        return Settings(lambda module: None if module in plain else layer, kv, place)
    listed = inner.get("quantized_layers")
    if not isinstance(listed, dict) or not listed or not all(isinstance(entry, dict) for entry in listed.values()):
        raise UserError(f"{place}: {MIXED} needs quantized_layers, an object that is missing; download it again")
    by_layer: dict[LayerQuantization, list[str]] = {}
    for name, entry in listed.items():
        by_layer.setdefault(_layer(entry, place, name), []).append(name)
    lists = {layer: ModuleList(names) for layer, names in by_layer.items()}

    def says(module: str) -> LayerQuantization | None:
        return None if module in plain else next((layer for layer, names in lists.items() if module in names), None)

    return Settings(says, kv, place)


def _layer(entry: Mapping[str, Any], place: str, name: str = "") -> LayerQuantization:
    of = f" of {name}" if name else ""
    layer = ALGORITHMS.get(str(entry.get("quant_algo")).upper())
    if layer is None:
        raise UserError(
            f"{place}: quant_algo {shown(entry.get('quant_algo'))}{of} cannot be read, only {', '.join(ALGORITHMS)} "
            f"and {MIXED} of them; take the model in bf16"
        )
    size = entry.get("group_size")
    if layer.format == "nvfp4" and size not in (None, BLOCK):
        raise UserError(f"{place}: group_size {shown(size)}{of} is not NVFP4's, which is {BLOCK}; take another model")
    return layer


def json_files(quantization: Quantization, plain: Sequence[str]) -> dict[str, dict[str, Any]]:
    """See `Layout.json_files`."""
    algorithms = {module_of(name): _NAMES[layer] for name, layer in quantization.weights.items()}
    used = [name for name in ALGORITHMS if name in algorithms.values()]
    excluded = _excluded(quantization, plain)
    about: dict[str, Any] = {
        "quant_algo": used[0] if len(used) == 1 else MIXED,
        "kv_cache_quant_algo": "FP8" if quantization.kv_scales else None,
        "group_size": BLOCK,
        "exclude_modules": excluded,
    }
    if used == ["FP8"]:
        del about["group_size"]
    groups: dict[str, Any] = {}
    for number, algorithm in enumerate(used):
        modules = [module for module, name in algorithms.items() if name == algorithm]
        groups[f"group_{number}"] = _group(algorithm) | {"targets": ["Linear"] if len(used) == 1 else modules}
    flat: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": about["quant_algo"], "config_groups": groups}
    if len(used) > 1:
        about["quantized_layers"] = flat["quantized_layers"] = {
            module: {"quant_algo": name} | ({} if name == "FP8" else {"group_size": BLOCK})
            for module, name in algorithms.items()
        }
    flat["ignore"] = excluded
    if quantization.kv_scales:
        flat["kv_cache_scheme"] = _FP8
    return {
        "quantization_config": flat | {"producer": PRODUCER},
        FILE: {"producer": PRODUCER, "quantization": about},
    }


def _group(algorithm: str) -> dict[str, Any]:
    arguments = _FP8 if algorithm == "FP8" else _NVFP4
    return ({"input_activations": arguments} if ALGORITHMS[algorithm].inputs else {}) | {"weights": arguments}


def _excluded(quantization: Quantization, plain: Sequence[str]) -> list[str]:
    """Return the plain modules as Model Optimizer lists them: wholly plain experts and MTP blocks as one wildcard."""
    quantized = {_block(name) for name in quantization.weights}
    blocks = {name: _block(name) for name in plain}
    return list(
        dict.fromkeys(name if block == name or block in quantized else f"{block}*" for name, block in blocks.items())
    )


def _block(name: str) -> str:
    """Return what a wildcard may stand for: the MTP block, the experts of a layer, else the module itself."""
    if name.startswith(MTP):
        return MTP.removesuffix(".")
    before, experts, _ = name.partition(STACKED)
    return before + experts.removesuffix(".") if experts else name


MODELOPT = Layout(
    name="modelopt",
    stored={
        "nvfp4": {
            "codes": Stored("weight", torch.uint8),
            "block_scales": Stored("weight_scale", torch.float8_e4m3fn),
            "scale": Stored("weight_scale_2", torch.float32),
            "input_scale": Stored("input_scale", torch.float32),
        },
        "fp8": FP8_PARTS,
    },
    reciprocal=False,
    scalar=(),
    kv_names=("k_proj.k_scale", "v_proj.v_scale"),
    json_files=json_files,
)
