"""Which weights of a model are quantised, and how files hold them: the part that all layouts have in common.

A quantised weight is several tensors in a file. Layouts differ in the names of these tensors, in whether they store the
fp32 scales of NVFP4 or their reciprocals, and in what their configuration says; `Layout` is a table of that, and
`modules.checkpoints.layouts` has one per layout.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from modules.checkpoints.config import shown
from modules.checkpoints.names import EMBEDDING, TensorInfo
from modules.errors import UserError
from modules.precision import e2m1
from modules.precision.blocks import BLOCK
from modules.precision.quantized import QuantizedWeight, WeightFormat

LayoutName = Literal["modelopt", "compressed-tensors"]
REPORT = "quantization_report.json"
"""File in which `quantize` says what it did; it travels along, and the model card quotes it."""
SCALES = frozenset({"scale", "input_scale"})
"""Fields of a `QuantizedWeight` that are one fp32 number."""
ROUTER = ".gate.weight"
"""End of the names of routers, which are fp32 everywhere."""
PREFIXES = ("backbone.", "model.")
"""What a list of modules puts before names: as checkpoints do, or as memory has them."""


class LayerQuantization(NamedTuple):
    """How one linear layer is quantised."""

    format: WeightFormat
    inputs: bool
    """Whether its inputs are quantised too (W4A4, W8A8), or the weight alone (NVFP4 only: W4A16)."""

    @property
    def label(self) -> str:
        """What people call it."""
        return "FP8" if self.format == "fp8" else f"NVFP4 {'W4A4' if self.inputs else 'W4A16'}"


class Quantization(NamedTuple):
    """What of a model is quantised."""

    weights: Mapping[str, LayerQuantization]
    """By public name of the weight, in the order of `public_names`; all others are plain."""
    kv_scales: Mapping[str, tuple[float, float]]
    """By attention module (e.g. backbone.layers.7.mixer): scales of keys and of values in an FP8 cache, largest
    magnitude over 448; empty: the cache is not quantised."""


class Stored(NamedTuple):
    """What a layout makes of one field of a `QuantizedWeight`."""

    suffix: str
    """Last part of the tensor's name, in the place of `weight`."""
    dtype: torch.dtype
    """Dtype on the disk."""


FP8_PARTS = {
    "codes": Stored("weight", torch.float8_e4m3fn),
    "scale": Stored("weight_scale", torch.float32),
    "input_scale": Stored("input_scale", torch.float32),
}
"""The tensors of a layer in FP8, in all layouts."""


class Settings(NamedTuple):
    """What a configuration says of quantised layers."""

    says: Callable[[str], LayerQuantization | None]
    """By module name; None: that it is plain."""
    kv: bool
    place: str
    """File and key, for messages."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How files spell a quantised model."""

    name: LayoutName
    """Its name in messages and on the command line."""
    stored: Mapping[WeightFormat, Mapping[str, Stored]]
    """By format: the tensors of a layer, by field of `QuantizedWeight`."""
    reciprocal: bool
    """Whether the fp32 scales of NVFP4 are stored as their reciprocals."""
    scalar: tuple[int, ...]
    """Shape of fp32 scales."""
    kv_names: tuple[str, str]
    """Names of the scales of keys and values below an attention module."""
    json_files: Callable[[Quantization, Sequence[str]], dict[str, dict[str, Any]]]
    """What to write beside the weights, of the quantisation and the names of the plain modules that have a weight
    matrix: `quantization_config`, which goes into config.json, and other files by name."""


def is_fp8_cache(scheme: Any, place: str) -> bool:
    """Return whether a configuration's entry for the KV cache means FP8 with a scale per layer, or none.

    Raises:
        UserError: it means another format.
    """
    if scheme is None:
        return False
    if isinstance(scheme, str) and scheme.upper() == "FP8":
        return True
    wanted = {"num_bits": 8, "type": "float", "dynamic": False, "strategy": "tensor", "symmetric": True}
    if isinstance(scheme, dict) and all(scheme.get(key, value) == value for key, value in wanted.items()):
        return True
    raise UserError(f"{place}: a KV cache in {shown(scheme)} cannot be read, only FP8 can; take another model")


def may_be_quantized(name: str, shape: Sequence[int]) -> bool:
    """Return whether a tensor is the weight of a linear layer, router and embedding apart."""
    return len(shape) == 2 and name.endswith(".weight") and not name.endswith(ROUTER) and name != EMBEDDING


def module_of(name: str) -> str:
    """Return the module that a tensor belongs to."""
    return name.rpartition(".")[0]


def stored_tensors(
    layout: Layout, layer: LayerQuantization, name: str, shape: Sequence[int]
) -> dict[str, tuple[str, TensorInfo]]:
    """Return name, shape and dtype of the tensors that hold a quantised weight, by field of `QuantizedWeight`.

    Args:
        layout: of the files.
        layer: how it is quantised.
        name: public name of the weight.
        shape: [O, I].
    """
    rows, columns = shape
    shapes = {
        "codes": (rows, columns // 2 if layer.format == "nvfp4" else columns),
        "block_scales": (rows, columns // BLOCK),
        "scale": layout.scalar,
        "input_scale": layout.scalar,
    }
    return {
        field: (f"{module_of(name)}.{suffix}", TensorInfo(shapes[field], dtype))
        for field, (suffix, dtype) in layout.stored[layer.format].items()
        if layer.inputs or field != "input_scale"
    }


def to_stored(layout: Layout, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors of a quantised weight as the layout stores them, by field."""
    fields = {field: tensor for field, tensor in weight._asdict().items() if isinstance(tensor, Tensor)}
    for field in fields.keys() & SCALES:
        fields[field] = _turned(layout, weight.format, fields[field].float()).reshape(layout.scalar)
    return fields


def from_stored(layout: Layout, format: WeightFormat, fields: Mapping[str, Tensor]) -> QuantizedWeight:
    """Return the quantised weight that `fields`, as the layout stores them, hold."""
    scale, input_scale = (
        _turned(layout, format, fields[field].float()).reshape(()) if field in fields else None
        for field in ("scale", "input_scale")
    )
    assert scale is not None
    return QuantizedWeight(format, fields["codes"], fields.get("block_scales"), scale, input_scale)


def dequantize_stored(layout: Layout, format: WeightFormat, fields: Mapping[str, Tensor]) -> Tensor:
    """Return fp32 [O, I]: what the layout's own library computes of the stored tensors."""
    scales = scaled_blocks(layout, format, fields)
    if format == "fp8":
        return fields["codes"].float() * scales
    numbers = e2m1.decode(e2m1.unpack(fields["codes"])).unflatten(-1, (-1, BLOCK))
    return (numbers * scales.unsqueeze(-1)).flatten(-2)


def scaled_blocks(layout: Layout, format: WeightFormat, fields: Mapping[str, Tensor]) -> Tensor:
    """Return what the codes are multiplied with, fp32 [O, I/16], or a scalar in FP8.

    It is a product in Model Optimizer (0.47, `NVFP4QTensor.dequantize`) and a quotient in compressed-tensors (0.20,
    `dequantize`). For weights quantised here the two are equal to the bit, for others they may differ in the last one.
    """
    scale = fields["scale"].float().reshape(())
    if format == "fp8":
        return scale
    blocks = fields["block_scales"].float()
    return blocks / scale if layout.reciprocal else blocks * scale


def _turned(layout: Layout, format: WeightFormat, scale: Tensor) -> Tensor:
    return scale.reciprocal() if layout.reciprocal and format == "nvfp4" else scale


class ModuleList:
    """A list of modules as a configuration has it: names, wildcards, regular expressions.

    Files name modules as the checkpoint does (`backbone.layers.0`) or as transformers and vLLM do in memory
    (`model.layers.0`); the two are one here. Lists may have tens of thousands of names (each expert of each layer), so
    names are looked up and only patterns are tried.

    Args:
        entries: names (a name stands for all modules below it, too), wildcards such as `mtp*` (as the engines read
            Model Optimizer's: `mtp` and all below), or regular expressions that begin with `re:` and match from the
            start (compressed-tensors).

    Raises:
        re.error: a regular expression is none.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        self._names: set[str] = set()
        patterns: list[str] = []
        for entry in entries:
            if entry.startswith("re:"):
                patterns.append(f"(?:{entry.removeprefix('re:')}).*")
            elif any(sign in entry for sign in "*?["):
                ends = (entry[:-1], entry[:-1] + ".*") if re.search(r"[^.]\*$", entry) else (entry,)
                patterns += map(fnmatch.translate, ends)
            else:
                self._names.add(_bare(entry))
        self._pattern = re.compile("|".join(patterns)) if patterns else None

    def __contains__(self, module: str) -> bool:
        bare = _bare(module)
        if any(name in self._names for name in _ancestors(bare)):
            return True
        return self._pattern is not None and any(
            self._pattern.fullmatch(spelling) for spelling in (bare, *(prefix + bare for prefix in PREFIXES))
        )


def _bare(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _ancestors(name: str) -> Iterator[str]:
    """Yield a name and those of the modules that it is in."""
    while name:
        yield name
        name = name.rpartition(".")[0]
