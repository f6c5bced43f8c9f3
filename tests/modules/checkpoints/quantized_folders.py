"""Quantised models on the disk for the tests, and a naive reading of their tensors."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from modules.backbone.config import BackboneConfig
from modules.checkpoints import export
from modules.checkpoints.export import convert
from modules.checkpoints.folder import new_folder
from modules.checkpoints.quantization import LayerQuantization, LayoutName, Quantization, may_be_quantized
from modules.checkpoints.source import ModelFolder, open_model
from modules.precision.quantized import QuantizedWeight, quantize_weight, tensor_scale
from tests.modules.checkpoints.folders import stored_tensors, write_hf_folder
from tests.modules.helpers import make_network, tiny_config

W4A4, W4A16, W8A8 = (
    LayerQuantization("nvfp4", inputs=True),
    LayerQuantization("nvfp4", inputs=False),
    LayerQuantization("fp8", inputs=True),
)
Choose = Callable[[str], LayerQuantization | None]
GRID = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
SHARDS = 20_000
LAYOUTS = ("modelopt", "compressed-tensors")
TINY = {"moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 48}
"""Widths that NVFP4's blocks divide, in place of those of `tiny_config`."""


def config(**changes) -> BackboneConfig:
    return tiny_config(**(TINY | changes))


def mixed(name: str) -> LayerQuantization | None:
    """A model of all formats, as the released ones are: heads, MTP blocks and the latent projections stay plain."""
    if name.startswith(("lm_head", "mtp.")) or "latent" in name:
        return None
    if any(part in name for part in ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj")):
        return W8A8
    return W4A16 if "out_proj" in name else W4A4


def choose(source: ModelFolder, choice: Choose) -> dict[str, LayerQuantization]:
    """The layers that `choice` quantises: of matrices, NVFP4 only where blocks divide the rows."""
    chosen = {}
    for name, info in source.tensors.items():
        layer = choice(name) if may_be_quantized(name, info.shape) else None
        if layer is not None and (layer.format == "fp8" or info.shape[1] % 16 == 0):
            chosen[name] = layer
    return chosen


def make_weight(source: ModelFolder, name: str, layer: LayerQuantization) -> QuantizedWeight:
    """Quantised as calibration would: q, k and v with one scale of the weight and of the inputs."""
    parent, _, last = name.removesuffix(".weight").rpartition(".")
    fused = [f"{parent}.{other}.weight" for other in ("q_proj", "k_proj", "v_proj")]
    weight = source.read(name)
    largest = max(source.read(other).abs().max() for other in fused) if f"{parent}.{last}.weight" in fused else None
    group = parent.partition(".experts.")[0] if last in ("q_proj", "k_proj", "v_proj") or ".experts." in name else name
    inputs = torch.tensor(1.0 + sum(group.encode()) % 97 / 7)
    return quantize_weight(
        weight,
        layer.format,
        amax=largest,
        input_scale=tensor_scale(inputs, layer.format) if layer.inputs else None,
    )


def write_quantized(
    source: ModelFolder,
    quantized: Mapping[str, LayerQuantization],
    kv_scales: Mapping[str, tuple[float, float]],
    make: Callable[[str], QuantizedWeight],
    output: Path,
    about: Mapping[str, Any] = MappingProxyType({}),
    **options,
) -> None:
    """A whole folder, as the command `quantize` writes one; `about` is the report."""
    layers = {name: quantized[name] for name in source.tensors if name in quantized}
    with new_folder(output) as folder:
        quantization = Quantization(layers, kv_scales)
        written = export.write_quantized(source, folder, quantization, map(make, layers), **options)
        export.finish(source, folder, output, written.tensors, written._replace(report=about))


def write_quantized_folder(
    path: Path,
    source: ModelFolder,
    choice: Choose = mixed,
    layout: LayoutName = "modelopt",
    kv: bool = True,
    limit: int = 10**9,
    **options,
) -> Path:
    quantized = choose(source, choice)
    attention = [name.removesuffix(".k_proj.weight") for name in source.tensors if name.endswith(".k_proj.weight")]
    scales = {module: (0.5 + number / 3, 0.25) for number, module in enumerate(attention)} if kv else {}
    scales = {module: tuple(torch.tensor(pair).tolist()) for module, pair in scales.items()}
    write_quantized(
        source,
        quantized,
        scales,
        lambda name: make_weight(source, name, quantized[name]),
        path,
        layout=layout,
        max_shard_bytes=limit,
        report=lambda line: None,
        **options,
    )
    return path


def make_source(path: Path, dtype: torch.dtype = torch.bfloat16, tokenizer: bool = False, **changes) -> ModelFolder:
    return open_model(write_hf_folder(path, make_network(config(**changes)), dtype, tokenizer=tokenizer))


def naive_nvfp4(codes: Tensor, blocks: Tensor, scale: Tensor) -> Tensor:
    """Code times (block scale times scale), value by value."""
    rows = []
    for row, scales in zip(codes.tolist(), blocks.float().tolist(), strict=True):
        numbers = [GRID[code] for byte in row for code in (byte & 15, byte >> 4)]
        factors = torch.tensor(scales) * scale
        rows.append([number * factor for number, factor in zip(numbers, factors.repeat_interleave(16), strict=True)])
    return torch.tensor(rows)


def raw_bytes(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def all_bytes(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    return {name: raw_bytes(tensor) for name, tensor in stored_tensors(path).items()}


def silent(line: str) -> None:
    pass


def change_layout(source: Path, target: Path, layout: Any, limit: int = 10**9) -> tuple[Path, list[str]]:
    lines: list[str] = []
    convert(open_model(source), target, layout=layout, max_shard_bytes=limit, report=lines.append)
    return target, [line for line in lines if line.startswith("note")]
