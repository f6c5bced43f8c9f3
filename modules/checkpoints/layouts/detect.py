"""Which layout a folder has, and what its configuration files say."""

from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from modules.checkpoints.config import CONFIG, shown
from modules.checkpoints.folder import read_json
from modules.checkpoints.layouts import compressed_tensors, modelopt
from modules.checkpoints.layouts.compressed_tensors import COMPRESSED_TENSORS
from modules.checkpoints.layouts.modelopt import MODELOPT
from modules.checkpoints.quantization import Layout, LayoutName, Quantization, Settings
from modules.errors import UserError

KEY = "quantization_config"
LAYOUTS: dict[LayoutName, Layout] = {layout.name: layout for layout in (MODELOPT, COMPRESSED_TENSORS)}


KINDS = {frozenset({"nvfp4"}): "nvfp4", frozenset({"fp8"}): "fp8", frozenset({"nvfp4", "fp8"}): "mixed"}
"""Formats of weights -> the first part of the name of an export's format."""


class Found(NamedTuple):
    """What a folder's configuration says of its quantisation."""

    layout: Layout
    """How its tensors are spelled."""
    settings: list[Settings]
    """One per file that says something."""


def find_layout(folder: Path, raw: dict[str, Any]) -> Found | None:
    """Return the layout of a Hugging Face folder; None: its configuration names no quantisation.

    Args:
        folder: may hold a hf_quant_config.json.
        raw: its config.json.

    Raises:
        UserError: the quantisation is of a kind that cannot be read, or the two files are of different kinds.
    """
    file, config = folder / modelopt.FILE, folder / CONFIG
    separate = read_json(file) if file.exists() else None
    inner = raw.get(KEY)
    if inner is None:
        return None if separate is None else Found(MODELOPT, [modelopt.settings(separate, str(file))])
    place = f"{config}: {KEY}"
    if not isinstance(inner, dict):
        raise UserError(f"{place} is damaged; copy or download the file again")
    method = inner.get("quant_method", "modelopt" if "quant_algo" in inner else None)
    if method == COMPRESSED_TENSORS.name:
        if separate is not None:
            raise UserError(f"{place} is of {method}, but {file} of Model Optimizer; remove the file that is not meant")
        return Found(COMPRESSED_TENSORS, [compressed_tensors.settings(inner, place)])
    if not str(method).startswith("modelopt"):
        raise UserError(
            f"{place}: quant_method {shown(method)} cannot be read, only {' and '.join(LAYOUTS)} are; take the model "
            "in bf16"
        )
    settings = [modelopt.settings(inner, place)]
    return Found(MODELOPT, settings if separate is None else [*settings, modelopt.settings(separate, str(file))])


def fitting_layout(format: str, quantization: Quantization | None, model: Path) -> LayoutName | None:
    """Return the layout that an export's format means for a model; None: plain weights.

    Args:
        format: hf, or nvfp4, fp8 or mixed with the layout, e.g. nvfp4-modelopt.
        quantization: of the model.
        model: its folder, for messages.

    Raises:
        UserError: the format wants another quantisation than the model has.
    """
    if format == "hf":
        return None
    if quantization is None:
        raise UserError(
            f"--format {format}: {model} is not quantised; first do that: "
            f"python -m app quantize {quote(str(model))} --output DIR"
        )
    kind, _, layout = format.partition("-")
    found = KINDS.get(frozenset(layer.format for layer in quantization.weights.values()))
    if found is None:
        raise UserError(f"--format {format}: {model} has no quantised weights, only a KV cache; take --format hf")
    if kind != found:
        has = {"nvfp4": "NVFP4 weights", "fp8": "FP8 weights", "mixed": "both NVFP4 and FP8 weights"}[found]
        raise UserError(f"--format {format}: {model} has {has}; take --format {found}-{layout}")
    return "modelopt" if layout == "modelopt" else "compressed-tensors"
