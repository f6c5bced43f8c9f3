"""A MODEL as a Hugging Face folder: what transformers, vLLM and the commands here load.

Each tensor keeps its bits unless another dtype is asked for, and what a source's own files say beyond the network
(sampling defaults, chat template, keys of `config.json` that change no number, licence) travels along.
"""

import shutil
from collections.abc import Callable, Collection, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from modules.checkpoints.card import UNLIMITED, write_card
from modules.checkpoints.card_quantized import Written, misreading
from modules.checkpoints.config import to_hugging_face
from modules.checkpoints.documents import read_json
from modules.checkpoints.huggingface import HuggingFaceSource
from modules.checkpoints.layouts.found import KEY as QUANTIZATION
from modules.checkpoints.layouts.found import LAYOUTS
from modules.checkpoints.names import EMBEDDING, HEAD, TensorInfo, placeholder_shapes
from modules.checkpoints.quantization import (
    REPORT,
    SCALES,
    LayerQuantization,
    Layout,
    LayoutName,
    Quantization,
    from_stored,
    module_of,
    scaled_blocks,
    stored_tensors,
    to_stored,
)
from modules.checkpoints.source import Source
from modules.checkpoints.writer import new_folder, write_json, write_tensors
from modules.precision.quantized import QuantizedWeight

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
CARD = "README.md"
ROUTER_BIAS = ".gate.e_score_correction_bias"
"""End of the names that stay fp32 in bf16 models: bf16 cannot hold differences below 2^-2 of values near 2^6."""
Dtype = Literal["auto", "fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)
"""Files and folders that make up a tokenizer, those of older transformers among them."""
LEGAL_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")
CODE_FILES = "*.py"

Documents = Callable[[Path], Mapping[str, Mapping[str, Any]]]
"""Returns JSON files by name for a folder that holds a model."""


class Exported(NamedTuple):
    """What was written."""

    files: list[str]
    """Names of all files, sorted."""
    tensors: int
    """Number of tensors."""
    size: int
    """Bytes of all files."""


def export(
    source: Source,
    output: Path,
    *,
    dtype: Dtype = "auto",
    max_shard_bytes: int,
    report: Callable[[str], None],
) -> Exported:
    """Write a model as a Hugging Face folder; one tensor (of a fit checkpoint: one stack of experts) is in memory.

    Two kinds of tensors are written beside the model's own, as transformers (5.23) would start them at random: a tied
    head, which it does not tie, and an all-zero shared expert for mixtures that have none, which it cannot build.

    Args:
        source: the model; quantised weights are written as the numbers they mean.
        output: folder to make; appears when it is complete.
        dtype: `auto` keeps each tensor's dtype, `fp32` widens all, `bf16` gives what the open checkpoints have: bf16
            everywhere but the router bias, which is fp32.
        max_shard_bytes: most bytes of tensors in a file.
        report: gets lines of progress.

    Raises:
        UserError: the output holds files already, or a tensor of the source is damaged.
        OSError: the disk is full; nothing is left behind.
    """
    tensors = stored_as(source, dtype)
    read = _plain_reader(source, tensors)
    return _write_folder(source, output, tensors, read, max_shard_bytes, report)


def write_quantized(
    source: Source,
    quantized: Mapping[str, LayerQuantization],
    kv_scales: Mapping[str, tuple[float, float]],
    make: Callable[[str], QuantizedWeight],
    output: Path,
    *,
    layout: LayoutName,
    dtype: Dtype = "auto",
    max_shard_bytes: int,
    report: Callable[[str], None],
    documents: Documents | None = None,
) -> Exported:
    """Write a quantised model as a Hugging Face folder; one layer is in memory at a time. See `export`.

    Args:
        source: gives the configuration, the tokenizer and the plain tensors.
        quantized: the weights to quantise, by public name.
        kv_scales: see `Quantization`.
        make: returns the quantised weight of a name; called once for each, in the order of `public_names`.
        output: folder to make; appears when it is complete.
        layout: how the files spell it.
        dtype: of the plain tensors.
        max_shard_bytes: most bytes of tensors in a file.
        report: gets lines of progress.
        documents: returns further JSON files by name; called once the folder, still under its temporary name, can be
            read as a MODEL. The model card quotes quantization_report.json.

    Raises:
        UserError: the output holds files already, or a tensor of the source is damaged.
        OSError: the disk is full; nothing is left behind.
    """
    spelling = LAYOUTS[layout]
    quantization = Quantization({name: quantized[name] for name in source.tensors if name in quantized}, kv_scales)

    def fields(name: str) -> dict[str, Tensor]:
        return to_stored(spelling, make(name))

    return _write_stored(source, quantization, fields, output, spelling, documents, dtype, max_shard_bytes, report)


def convert(
    source: Source,
    output: Path,
    *,
    layout: LayoutName,
    dtype: Dtype = "auto",
    max_shard_bytes: int,
    report: Callable[[str], None],
) -> Exported:
    """Write a quantised model in its own or another layout, with the same codes and block scales.

    In its own layout every bit stays. Another one may want reciprocals of scales: those of models quantised here are
    exact, those of other programs may move in the last bit, and `report` gets a line that counts them.

    Args:
        source: the model, quantised.
        output: see `export`, as for the other arguments.
        layout: how the files spell it.
        dtype: of the plain tensors.
        max_shard_bytes: see `export`.
        report: see `export`.

    Raises:
        UserError: see `export`.
        OSError: see `export`.
    """
    quantization = source.quantization
    assert isinstance(source, HuggingFaceSource)
    assert quantization is not None
    assert source.layout is not None
    old, new, moved = source.layout, LAYOUTS[layout], 0

    def fields(name: str) -> dict[str, Tensor]:
        nonlocal moved
        stored, format = source.read_stored(name), quantization.weights[name].format
        if old is new:
            return stored
        made = to_stored(new, from_stored(old, format, stored))
        back = to_stored(old, from_stored(new, format, made))
        moved += not (
            torch.equal(scaled_blocks(old, format, stored), scaled_blocks(new, format, made))
            and all(
                torch.equal(back[field], stored[field].float().reshape(old.scalar)) for field in SCALES & made.keys()
            )
        )
        return made

    def documents(_: Path) -> dict[str, Any]:
        return {REPORT: source.facts["quantization"]} if "quantization" in source.facts else {}

    written = _write_stored(source, quantization, fields, output, new, documents, dtype, max_shard_bytes, report)
    if moved:
        report(
            f"note: {moved:,} of {len(quantization.weights):,} quantised weights have a scale without an exact "
            "reciprocal; their numbers move by up to one unit in the last place of fp32"
        )
    if misread := misreading(new, quantization, source.tensors.keys() - quantization.weights.keys()):
        report(f"note: {misread}")
    return written


def _write_stored(
    source: Source,
    quantization: Quantization,
    fields: Callable[[str], Mapping[str, Tensor]],
    output: Path,
    layout: Layout,
    documents: Documents | None,
    dtype: Dtype,
    max_shard_bytes: int,
    report: Callable[[str], None],
) -> Exported:
    """Write a quantised model from tensors that are as the layout has them.

    `fields` returns those of a weight, by field of `QuantizedWeight`; it is called once for each, in order.
    """
    plain = stored_as(source, dtype, besides=quantization.weights)
    read_plain = _plain_reader(source, plain)
    caches = {
        f"{module}.{end}": scale
        for module, scales in quantization.kv_scales.items()
        for end, scale in zip(layout.kv_names, scales, strict=True)
    }
    parts: dict[str, tuple[str, str]] = {}
    tensors: dict[str, TensorInfo] = {}
    for name in dict.fromkeys([*source.tensors, *plain]):
        if name in plain:
            tensors[name] = plain[name]
            continue
        layer = quantization.weights[name]
        for field, (part, info) in stored_tensors(layout, layer, name, source.tensors[name].shape).items():
            parts[part], tensors[part] = (name, field), info
    tensors |= dict.fromkeys(caches, TensorInfo(layout.scalar, torch.float32))
    made: dict[str, Mapping[str, Tensor]] = {}

    def read(name: str) -> Tensor:
        if name in caches:
            return torch.tensor(caches[name]).reshape(layout.scalar)
        if name not in parts:
            return read_plain(name)
        weight, field = parts[name]
        if weight not in made:
            made.clear()
            made[weight] = fields(weight)
        return made[weight][field].reshape(tensors[name].shape)

    matrices = [module_of(name) for name, info in plain.items() if len(info.shape) > 1 and name.endswith(".weight")]
    written = Written(quantization, layout, matrices, {})
    return _write_folder(source, output, tensors, read, max_shard_bytes, report, written, documents)


def _plain_reader(source: Source, tensors: Mapping[str, TensorInfo]) -> Callable[[str], Tensor]:
    """Return what reads the source's tensors, and those that are written beside them."""

    def read(name: str) -> Tensor:
        if name in source.tensors:
            return source.read(name)
        return source.read(EMBEDDING) if name == HEAD else torch.zeros(tensors[name].shape)

    return read


def _write_folder(
    source: Source,
    output: Path,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    max_shard_bytes: int,
    report: Callable[[str], None],
    quantized: Written | None = None,
    documents: Documents | None = None,
) -> Exported:
    """Write the folder: weights, tokenizer, configuration, what `documents` returns, card."""
    with new_folder(output) as target:
        write_tensors(target, tensors, read, max_shard_bytes, report)
        code = _copy_files(source, target)
        config = hugging_face_config(source, tensors, code)
        if quantized is not None:
            settings = quantized.layout.documents(quantized.quantization, quantized.plain)
            config[QUANTIZATION] = settings.pop(QUANTIZATION)
            for name, content in settings.items():
                write_json(target / name, content)
        write_json(target / CONFIG, config)
        write_json(target / GENERATION_CONFIG, generation_config(source))
        if quantized is not None and documents is not None:
            quantized = quantized._replace(documents=documents(target))
            for name, content in quantized.documents.items():
                write_json(target / name, content)
        card = write_card(source, tensors, output.absolute().name, quantized)
        (target / CARD).write_text(card, encoding="utf-8")
        files = [path for path in target.rglob("*") if path.is_file()]
        names = sorted(str(path.relative_to(target)) for path in files)
        return Exported(names, len(tensors), sum(path.stat().st_size for path in files))


def stored_as(source: Source, dtype: Dtype, besides: Collection[str] = ()) -> dict[str, TensorInfo]:
    """Return shape and dtype of each plain tensor in the folder to write; see `export`.

    Args:
        source: the model.
        dtype: see `export`.
        besides: the weights that are written quantised.
    """
    tensors = {name: info for name, info in source.tensors.items() if name not in besides}
    main = main_dtype(tensors)
    tensors |= {name: TensorInfo(shape, main) for name, shape in placeholder_shapes(source.config).items()}
    if source.config.tie_word_embeddings:
        tensors[HEAD] = tensors[EMBEDDING]
    if dtype == "auto":
        return tensors
    return {
        name: TensorInfo(info.shape, torch.float32 if name.endswith(ROUTER_BIAS) else DTYPES[dtype])
        for name, info in tensors.items()
    }


def hugging_face_config(source: Source, tensors: Mapping[str, TensorInfo], code: bool) -> dict[str, Any]:
    """Return the content of config.json.

    Args:
        source: the model; keys of its own config.json that change no number of the network survive.
        tensors: what is written; the dtype of most of it is the one that transformers' `dtype="auto"` loads.
        code: whether the source's own Python files travel along, for transformers without the architecture.
    """
    raw: dict[str, Any] = source.facts.get("config", {})
    generation = None if raw else source.generation  # what generation_config.json says stays there
    config = to_hugging_face(source.config, main_dtype(tensors), generation, kept=raw)
    if code:
        config["auto_map"] = raw["auto_map"]
    if "run" not in source.facts:
        return config
    config["time_step_min"] = UNLIMITED
    data = source.facts["run"].get("data", {}).get("init_args", {})
    return {"max_position_embeddings": data["sequence_length"]} | config if "sequence_length" in data else config


def generation_config(source: Source) -> dict[str, Any]:
    """Return the content of generation_config.json: special tokens and the source's own sampling defaults."""
    generation, eos = source.generation, list(source.generation.eos_token_ids)
    ids = {
        "bos_token_id": generation.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "pad_token_id": generation.pad_token_id,
    }
    return {key: value for key, value in ids.items() if value not in (None, [])} | generation.other


def main_dtype(tensors: Mapping[str, TensorInfo]) -> torch.dtype:
    """Return the dtype that most elements have, codes and block scales of quantised weights apart."""
    elements: dict[torch.dtype, int] = {}
    for info in tensors.values():
        if info.dtype not in (torch.uint8, torch.float8_e4m3fn):
            elements[info.dtype] = elements.get(info.dtype, 0) + prod(info.shape)
    return max(elements, key=lambda dtype: elements[dtype])


def _copy_files(source: Source, target: Path) -> bool:
    """Copy tokenizer, licence and what else belongs to a model; return whether Python files are among them."""
    for name in TOKENIZER_FILES:
        path = (source.tokenizer_folder or source.path) / name
        if path.is_dir():
            shutil.copytree(path, target / name)
        elif path.is_file():
            if path.suffix == ".json":
                read_json(path)  # raises where it is damaged
            shutil.copyfile(path, target / name)
    code = list(source.path.glob(CODE_FILES)) if "auto_map" in source.facts.get("config", {}) else []
    legal = [path for pattern in LEGAL_FILES for path in source.path.glob(pattern) if path.is_file()]
    for path in [*code, *legal]:
        shutil.copyfile(path, target / path.name)
    return bool(code)
