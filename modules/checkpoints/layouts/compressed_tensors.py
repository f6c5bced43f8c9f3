"""compressed-tensors' layout: what LLM Compressor writes, and transformers and vLLM read.

Source: compressed-tensors 0.20, compressors/nvfp4/base.py, compressors/naive_quantized/base.py, quantization/
quant_scheme.py (presets NVFP4, NVFP4A16, FP8), utils/match.py.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from modules.checkpoints.config import shown
from modules.checkpoints.names import STACKED
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

CLASS = "Linear"
"""A target that stands for all linear layers."""
FORMATS = {"nvfp4": "nvfp4-pack-quantized", "fp8": "float-quantized"}
MIXED = "mixed-precision"
READ = {*FORMATS.values(), MIXED, "naive-quantized"}
"""Of these formats, the last is an older name of the one for FP8."""
PRESETS = {
    "NVFP4": LayerQuantization("nvfp4", inputs=True),
    "NVFP4A16": LayerQuantization("nvfp4", inputs=False),
    "FP8": LayerQuantization("fp8", inputs=True),
}
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
_NVFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": BLOCK}
_WEIGHTS = {"fp8": _FP8, "nvfp4": {**_NVFP4, "dynamic": False, "scale_dtype": "torch.float8_e4m3fn"}}
_INPUTS = {
    "fp8": _FP8,
    "nvfp4": {**_NVFP4, "dynamic": "local", "scale_dtype": "torch.float8_e4m3fn", "observer": "static_minmax"},
}


def settings(document: Mapping[str, Any], place: str) -> Settings:
    """Return what `quantization_config` of config.json says.

    Raises:
        UserError: it is damaged, or names another format than NVFP4 (with or without inputs) and per-tensor FP8.
    """
    formats = [document.get("format"), *(group.get("format") for group in _groups(document, place).values())]
    for name in formats:
        if name is not None and name not in READ:
            raise UserError(
                f"{place}: format {shown(name)} cannot be read, only {', '.join(sorted(READ))}; take the model in bf16"
            )
    for key in ("transform_config", "sparsity_config"):
        if document.get(key):
            raise UserError(f"{place}: {key} cannot be applied here; take the model in bf16")
    try:
        plain = ModuleList(document.get("ignore") or [])
        targets = [
            (group["targets"], _layer(group, f"{place}.config_groups.{name}"))
            for name, group in _groups(document, place).items()
        ]
        named = [(ModuleList(names), layer) for names, layer in targets]
    except (TypeError, KeyError, AttributeError, re.error):
        raise UserError(f"{place}: targets or ignore are damaged; copy or download the file again") from None
    everything = next((layer for names, layer in targets if CLASS in names), None)

    def says(module: str) -> LayerQuantization | None:
        if module in plain:
            return None
        return next((layer for names, layer in named if module in names), everything)

    return Settings(says, is_fp8_cache(document.get("kv_cache_scheme"), place), place)


def _groups(document: Mapping[str, Any], place: str) -> dict[str, dict[str, Any]]:
    """Return the groups, those that only name a preset (`NVFP4: [Linear]`) written out."""
    groups = document.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise UserError(f"{place}: config_groups must say what is quantised; copy or download the file again")
    full = {}
    for name, group in groups.items():
        if isinstance(group, list) and name.upper() in PRESETS:
            group = {"targets": group, **_arguments(PRESETS[name.upper()])}
        if not isinstance(group, dict):
            raise UserError(
                f"{place}.config_groups.{name}: it cannot be read, only {', '.join(PRESETS)} are known by name; take "
                "the model in bf16"
            )
        full[name] = group
    return full


def _layer(group: Mapping[str, Any], place: str) -> LayerQuantization:
    """Return what a group's arguments mean."""
    for layer in PRESETS.values():
        wanted = _arguments(layer)
        if all(_means(group.get(side), wanted.get(side)) for side in ("weights", "input_activations")):
            if group.get("output_activations") is None:
                return layer
    brief = {
        side: group.get(side) for side in ("weights", "input_activations", "output_activations") if group.get(side)
    }
    raise UserError(
        f"{place}: it is neither {' nor '.join(PRESETS)} with static scales, which alone can be read "
        f"({shown(brief)}); take the model in bf16"
    )


def _arguments(layer: LayerQuantization) -> dict[str, Any]:
    inputs = {"input_activations": _INPUTS[layer.format]} if layer.inputs else {}
    return {"weights": _WEIGHTS[layer.format], **inputs}


def _means(said: Any, wanted: Mapping[str, Any] | None) -> bool:
    """Return whether arguments are those wanted; what changes no number does not count."""
    if said is None or wanted is None:
        return said is None and wanted is None
    defaults = {"symmetric": True, "dynamic": False, "strategy": "tensor" if "group_size" not in wanted else None}
    keys = ("num_bits", "type", "symmetric", "strategy", "dynamic", "group_size")
    said = {key: value for key, value in said.items() if value is not None}
    return all(said.get(key, defaults.get(key)) == wanted.get(key) for key in keys)


def json_files(quantization: Quantization, plain: Sequence[str]) -> dict[str, dict[str, Any]]:
    """See `Layout.json_files`.

    The layers of one kind, the routed experts' if there are any, are the target `Linear`; the others are listed.
    """
    modules: dict[LayerQuantization, list[str]] = {}
    for name, layer in quantization.weights.items():
        modules.setdefault(layer, []).append(module_of(name))
    routed = {layer for name, layer in quantization.weights.items() if STACKED in name}
    kinds = sorted(modules, key=lambda layer: (layer not in routed, -len(modules[layer])))
    groups = {
        f"group_{number}": {
            "targets": [CLASS] if number == 0 else _spelled(modules[layer]),
            **_arguments(layer),
            "format": FORMATS[layer.format],
        }
        for number, layer in enumerate(kinds)
    }
    formats = {FORMATS[layer.format] for layer in kinds}
    about: dict[str, Any] = {
        "quant_method": COMPRESSED_TENSORS.name,
        "format": next(iter(formats)) if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _spelled(plain),
        "kv_cache_scheme": _FP8 if quantization.kv_scales else None,
    }
    return {"quantization_config": about}


def _spelled(modules: Sequence[str]) -> list[str]:
    """Return names as the checkpoint and, for transformers, as memory has them."""
    return [spelling for name in modules for spelling in dict.fromkeys((name, re.sub("^backbone", "model", name)))]


COMPRESSED_TENSORS = Layout(
    name="compressed-tensors",
    stored={
        "nvfp4": {
            "codes": Stored("weight_packed", torch.uint8),
            "block_scales": Stored("weight_scale", torch.float8_e4m3fn),
            "scale": Stored("weight_global_scale", torch.float32),
            "input_scale": Stored("input_global_scale", torch.float32),
        },
        "fp8": FP8_PARTS,
    },
    reciprocal=True,
    scalar=(1,),
    kv_names=("k_scale", "v_scale"),
    json_files=json_files,
)
