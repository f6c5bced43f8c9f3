"""The quantised layers of a folder: found by their tensors, checked against each other and against the configuration.

What the tensors say decides; a configuration that says otherwise is refused, because engines would believe it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modules.checkpoints.names import STACKED, TensorInfo
from modules.checkpoints.quantization import (
    SCALES,
    LayerQuantization,
    Layout,
    Quantization,
    Settings,
    may_be_quantized,
    module_of,
    stored_tensors,
)
from modules.checkpoints.safetensors import AGAIN, DTYPES, Entry, check_finite
from modules.errors import UserError
from modules.precision.blocks import BLOCK
from modules.precision.quantized import WeightFormat

CODES: dict[torch.dtype, WeightFormat] = {torch.uint8: "nvfp4", torch.float8_e4m3fn: "fp8"}
NO_SCALE = 1.0
"""What engines take for the scales of an FP8 cache that a checkpoint does not give."""
KV_ENDS = (".k_scale", ".v_scale")
FUSED = ("q_proj", "k_proj", "v_proj")
Entries = Mapping[str, Entry]


class StoredLayer(NamedTuple):
    """A quantised layer in the files."""

    layer: LayerQuantization
    info: TensorInfo
    """Shape [O, I] of its weight; dtype fp32, as which it is read."""
    parts: dict[str, tuple[str, Entry]]
    """Names and places of its tensors, by field of `QuantizedWeight`."""

    def read(self, rows: slice | None = None) -> dict[str, Tensor]:
        """Return its tensors as they are stored, by field; of codes and block scales some rows, or all.

        Raises:
            UserError: a value is not finite or, being a scale, not positive.
        """
        return {
            field: read_checked(*part, scale=field != "codes", rows=None if field in SCALES else rows)
            for field, part in self.parts.items()
        }


def read_checked(name: str, entry: Entry, scale: bool, rows: slice | None = None) -> Tensor:
    """Read a tensor of a quantised layer; codes must be finite, scales of tensors positive, of blocks not negative.

    Raises:
        UserError: they are not.
    """
    tensor = entry.read(rows)
    if tensor.dtype == torch.uint8 or not tensor.numel():
        return tensor
    values = tensor.float()
    check_finite(values, name, entry.file)
    least = 0.0 if entry.info.dtype == torch.float8_e4m3fn else torch.finfo(torch.float32).tiny
    if scale and values.amin() < least:
        raise UserError(
            f"{entry.file}: tensor {name} holds a scale of {values.amin():g}, which is not positive; the model was "
            "saved broken: take another checkpoint of it"
        )
    return tensor


def separate(entries: Entries, layout: Layout) -> tuple[dict[str, Entry], dict[str, StoredLayer], dict[str, Entry]]:
    """Return the plain tensors, the quantised layers by the name of their weight, and the scales of KV caches.

    Args:
        entries: all tensors of a folder, by public name.
        layout: how quantised ones are spelled.

    Raises:
        UserError: a tensor of a quantised layer is missing, or has another shape or dtype than it must have.
    """
    suffixes = sorted({stored.suffix for tensors in layout.stored.values() for stored in tensors.values()})
    modules: dict[str, None] = {}
    for name, entry in entries.items():
        module, _, suffix = name.rpartition(".")
        if suffix in suffixes and (suffix != "weight" or entry.info.dtype in CODES):
            modules[module] = None
        elif entry.info.dtype in CODES:
            raise UserError(
                f"{entry.file}: tensor {name} is {_short(entry.info.dtype)}, but {layout.name} has no such tensor of a "
                f"quantised layer; {AGAIN}, or take the model in bf16"
            )
    layers = {f"{module}.weight": _layer(module, entries, layout, suffixes) for module in modules}
    used = {name for layer in layers.values() for name, _ in layer.parts.values()}
    caches = {name: entry for name, entry in entries.items() if name.endswith(KV_ENDS)}
    plain = {name: entry for name, entry in entries.items() if name not in used and name not in caches}
    return plain, layers, caches


def _layer(module: str, entries: Entries, layout: Layout, suffixes: Sequence[str]) -> StoredLayer:
    there = {suffix: entries[f"{module}.{suffix}"] for suffix in suffixes if f"{module}.{suffix}" in entries}
    format: WeightFormat | None = None
    for candidate, tensors in layout.stored.items():
        codes = there.get(tensors["codes"].suffix)
        if codes is not None and CODES.get(codes.info.dtype) == candidate:
            format = candidate
    if format is None:
        suffix, entry = next(iter(there.items()))
        wanted = " or ".join(
            f"{tensors['codes'].suffix} in {_short(tensors['codes'].dtype)}" for tensors in layout.stored.values()
        )
        raise UserError(
            f"{entry.file}: {module}.{suffix} ({_short(entry.info.dtype)}) is of a quantised layer, but there is no "
            f"{module}.{wanted}; {AGAIN}, or take the model in bf16"
        )
    tensors = layout.stored[format]
    codes = there[tensors["codes"].suffix]
    packed = codes.info.shape
    shape = (*packed[:-1], packed[-1] * (2 if format == "nvfp4" else 1)) if packed else packed
    if not may_be_quantized(f"{module}.weight", shape):
        raise UserError(
            f"{codes.file}: tensor {module}.{tensors['codes'].suffix} is quantised, which only the matrices of linear "
            "layers can be here, routers and embeddings apart; take the model in bf16"
        )
    if format == "nvfp4" and shape[-1] % BLOCK:
        raise UserError(
            f"{codes.file}: tensor {module}.{tensors['codes'].suffix} has rows of {shape[-1]} codes, but blocks of "
            f"NVFP4 have {BLOCK}; {AGAIN}"
        )
    layer = LayerQuantization(format, inputs=tensors["input_scale"].suffix in there)
    wanted = stored_tensors(layout, layer, f"{module}.weight", shape)
    if format == "fp8" and not layer.inputs:
        raise UserError(
            f"{codes.file}: tensor {module}.{tensors['input_scale'].suffix} is missing: FP8 weights with inputs that "
            "are not quantised, or with a scale of their own per token, cannot be read; take the model in bf16"
        )
    parts = {}
    for field, (name, info) in wanted.items():
        entry = entries.get(name)
        if entry is None:
            raise UserError(
                f"{codes.file}: tensor {module}.{tensors['codes'].suffix} is quantised, but its {name} is missing; "
                f"download the folder again"
            )
        _check(name, entry, info)
        parts[field] = name, entry
    extra = there.keys() - {stored.suffix for stored in tensors.values()}
    if extra:
        name = f"{module}.{min(extra)}"
        raise UserError(
            f"{entries[name].file}: tensor {name} does not belong beside {tensors['codes'].suffix} in "
            f"{_short(codes.info.dtype)}; download the folder again"
        )
    return StoredLayer(layer, TensorInfo(shape, torch.float32), parts)


def _check(name: str, entry: Entry, wanted: TensorInfo) -> None:
    """Check shape and dtype of a tensor; fp32 scales may be bf16 or fp16, and [1] instead of []."""
    shape, dtype = entry.info
    scalar = wanted.dtype == torch.float32
    if (scalar and shape in ((), (1,)) and dtype in DTYPES.values()) or (shape, dtype) == wanted:
        return
    raise UserError(
        f"{entry.file}: tensor {name} is {_short(dtype)} {list(shape)}, but must be {_short(wanted.dtype)} "
        f"{list(wanted.shape)}; download the folder again"
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_settings(settings: Settings, quantization: Quantization, plain: Iterable[str]) -> list[str]:
    """Check that a configuration says of each layer what its tensors say.

    Args:
        settings: of one file.
        quantization: of the tensors.
        plain: names of the plain weights that could be quantised.

    Returns:
        A line for the user where it leaves open that plain weights are plain.

    Raises:
        UserError: it says otherwise of a quantised layer, or the KV cache.
    """
    for name, layer in quantization.weights.items():
        said = settings.says(module_of(name))
        if said != layer:
            lacks = " (there is no scale of its inputs)" if said is not None and said.inputs > layer.inputs else ""
            raise UserError(
                f"{settings.place} says that {module_of(name)} is {said.label if said else 'not quantised'}, but its "
                f"tensors are {layer.label}{lacks}; one of the two is not of this model: download both again"
            )
    if quantization.kv_scales and not settings.kv:
        raise UserError(
            f"{settings.place} says nothing of an FP8 KV cache, but the weight files hold scales for it "
            f"({next(iter(quantization.kv_scales))}); one of the two is not of this model: download both again"
        )
    unlisted = [name for name in plain if settings.says(module_of(name)) is not None]
    if unlisted and not quantization.weights:
        raise UserError(
            f"{settings.place} says that weights are quantised, but no tensor is; remove it if the model is plain, or "
            "download the model again"
        )
    if not unlisted:
        return []
    return [
        f"{settings.place} does not say that {len(unlisted)} plain weights are plain (first {unlisted[0]}), so that "
        "engines may fail on them; an export says it"
    ]


def kv_scales(
    caches: Entries, attention: Sequence[str], layout: Layout, stated: bool, folder: object
) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """Return the scales of KV caches by attention module, and a line for the user where engines take 1.

    Args:
        caches: the scales in the files.
        attention: names of all attention modules.
        layout: how they are spelled.
        stated: whether the configuration says that the cache is FP8.
        folder: for messages.

    Raises:
        UserError: a scale is of no attention module, has another shape, or is not positive.
    """
    names = {f"{module}.{end}": (module, number) for module in attention for number, end in enumerate(layout.kv_names)}
    found: dict[str, list[float]] = {module: [NO_SCALE, NO_SCALE] for module in attention} if stated or caches else {}
    for name, entry in caches.items():
        if name not in names:
            raise UserError(
                f"{entry.file}: tensor {name} is the scale of a KV cache, but {layout.name} has none of this name in "
                "this network; download the folder again"
            )
        _check(name, entry, TensorInfo((), torch.float32))
        module, number = names[name]
        found[module][number] = read_checked(name, entry, scale=True).float().item()
    missing = [name for name in names if name not in caches] if found else []
    lines = []
    if missing:
        lines = [
            f"{folder}: the KV cache is FP8, but {len(missing)} of its {len(names)} scales are not there "
            f"({missing[0]}); they are taken as 1, as engines do"
        ]
    return {module: (scales[0], scales[1]) for module, scales in found.items()}, lines


def fused_notes(layers: Mapping[str, StoredLayer], folder: object) -> list[str]:
    """Return a line for the user for each kind of fused layers whose scales engines would replace by the largest.

    Engines compute q_proj, k_proj and v_proj as one product with one scale of the weight and one of the inputs, and
    all experts of a layer with one scale of the inputs.

    Raises:
        UserError: a scale is not positive and finite.
    """
    groups: dict[tuple[str, str, WeightFormat], list[StoredLayer]] = {}
    for name, layer in layers.items():
        parent, _, last = module_of(name).rpartition(".")
        if last in FUSED:
            groups.setdefault((parent, "weights and inputs of q_proj, k_proj, v_proj", layer.layer.format), []).append(
                layer
            )
        elif STACKED in name:
            experts = parent.rpartition(".")[0]
            groups.setdefault((f"{experts}.*.{last}", "inputs of a layer's experts", layer.layer.format), []).append(
                layer
            )
    different: dict[str, list[str]] = {}
    for (place, what, _), members in groups.items():
        fields = ["input_scale"] if STACKED.removesuffix(".") in place else ["scale", "input_scale"]
        for field in fields:
            parts = [layer.parts[field] for layer in members if field in layer.parts]
            if len({read_checked(*part, scale=True).item() for part in parts}) > 1:
                different.setdefault(what, []).append(place)
                break
    return [
        f"{folder}: scales of {what} differ in {len(places)} places (first {places[0]}); engines take the largest, so "
        "that they compute other numbers than are read here"
        for what, places in different.items()
    ]
