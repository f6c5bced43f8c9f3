"""A MODEL as a Hugging Face folder: what transformers, vLLM and the commands here load.

Each tensor keeps its bits unless another dtype is asked for, and what a source's own files say beyond the network
(sampling defaults, chat template, keys of `config.json` that change no number, licence) travels along.
"""

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from modules.checkpoints.card import UNLIMITED, write_card
from modules.checkpoints.card_quantized import NEEDS, Written, misreading
from modules.checkpoints.config import CONFIG, GENERATION_CONFIG, to_hugging_face
from modules.checkpoints.folder import new_folder, read_json, write_json
from modules.checkpoints.huggingface import HuggingFaceSource
from modules.checkpoints.layouts.detect import KEY as QUANTIZATION
from modules.checkpoints.layouts.detect import LAYOUTS
from modules.checkpoints.names import EMBEDDING, HEAD, TensorInfo, placeholder_shapes
from modules.checkpoints.quantization import (
    REPORT,
    SCALES,
    Layout,
    LayoutName,
    Quantization,
    from_stored,
    module_of,
    scaled_blocks,
    stored_tensors,
    to_stored,
)
from modules.checkpoints.safetensors import write_tensors
from modules.checkpoints.source import ModelFolder
from modules.precision.quantized import QuantizedWeight

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


class Exported(NamedTuple):
    """What was written."""

    files: list[str]
    """Names of all files, sorted."""
    tensors: int
    size: int
    """Bytes of all files."""


def export(
    source: ModelFolder,
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
    with new_folder(output) as folder:
        write_tensors(folder, tensors, (_read(source, tensors, name) for name in tensors), max_shard_bytes, report)
        _write_settings(source, folder, tensors)
        return finish(source, folder, output, tensors)


def convert(
    source: ModelFolder,
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
    old, new = source.layout, LAYOUTS[layout]
    weights = (
        source.read_stored(name) if old is new else to_stored(new, source.read_quantized(name))
        for name in quantization.weights
    )
    with new_folder(output) as folder:
        written = _write_stored(source, folder, quantization, weights, new, dtype, max_shard_bytes, report)
        if "quantization" in source.facts:
            written = written._replace(report=source.facts["quantization"])
        exported = finish(source, folder, output, written.tensors, written)
    turned = [name for name, layer in quantization.weights.items() if layer.format == "nvfp4" and old is not new]
    if moved := sum(not _is_exact(source, name, old, new) for name in turned):
        report(
            f"note: {moved:,} of {len(quantization.weights):,} quantised weights have a scale without an exact "
            "reciprocal; their numbers move by up to one unit in the last place of fp32"
        )
    if misread := misreading(new, quantization, source.tensors.keys() - quantization.weights.keys()):
        report(f"note: {misread}")
    if layout == "compressed-tensors":
        report(f"note: {NEEDS}")
    return exported


def write_quantized(
    source: ModelFolder,
    folder: Path,
    quantization: Quantization,
    weights: Iterator[QuantizedWeight],
    *,
    layout: LayoutName,
    dtype: Dtype = "auto",
    max_shard_bytes: int,
    report: Callable[[str], None],
) -> Written:
    """Write a quantised model into a folder, all but the model card (`finish`); one layer is in memory at a time.

    Args:
        source: gives the configuration, the tokenizer and the plain tensors.
        folder: a new one, see `new_folder`; can be read as a MODEL afterwards.
        quantization: what is quantised, in the order of `source.tensors`.
        weights: the quantised weights, in that order; one is taken when the one before is written.
        layout: how the files spell it.
        dtype: of the plain tensors, see `export`.
        max_shard_bytes: most bytes of tensors in a file.
        report: gets lines of progress.

    Raises:
        UserError: a tensor of the source is damaged.
        OSError: the disk is full.
    """
    stored = map(partial(to_stored, LAYOUTS[layout]), weights)
    return _write_stored(source, folder, quantization, stored, LAYOUTS[layout], dtype, max_shard_bytes, report)


def finish(
    source: ModelFolder,
    folder: Path,
    output: Path,
    tensors: Mapping[str, TensorInfo],
    quantized: Written | None = None,
) -> Exported:
    """Write the model card into a folder that has all else, and the report on the quantisation that it quotes.

    Args:
        source: the model.
        folder: the folder, under its temporary name.
        output: the folder's own name.
        tensors: shape and dtype of each tensor as written.
        quantized: how it is quantised; None: it is not.
    """
    if quantized is not None and quantized.report:
        write_json(folder / REPORT, quantized.report)
    (folder / CARD).write_text(write_card(source, tensors, output.absolute().name, quantized), encoding="utf-8")
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = sorted(str(path.relative_to(folder)) for path in files)
    return Exported(names, len(tensors), sum(path.stat().st_size for path in files))


def _write_stored(
    source: ModelFolder,
    folder: Path,
    quantization: Quantization,
    weights: Iterator[dict[str, Tensor]],
    layout: Layout,
    dtype: Dtype,
    max_shard_bytes: int,
    report: Callable[[str], None],
) -> Written:
    """See `write_quantized`; `weights` are as the layout stores them, by field of `QuantizedWeight`."""
    plain = stored_as(source, dtype, besides=quantization.weights)
    parts = {
        name: stored_tensors(layout, layer, name, source.tensors[name].shape)
        for name, layer in quantization.weights.items()
    }
    tensors: dict[str, TensorInfo] = {}
    for name in dict.fromkeys([*source.tensors, *plain]):
        tensors |= {name: plain[name]} if name in plain else dict(parts[name].values())
    scales = {
        f"{module}.{end}": scale
        for module, pair in quantization.kv_scales.items()
        for end, scale in zip(layout.kv_names, pair, strict=True)
    }
    tensors |= dict.fromkeys(scales, TensorInfo(layout.scalar, torch.float32))
    values = chain(
        _values(source, plain, parts, weights), (torch.full(layout.scalar, scale) for scale in scales.values())
    )
    write_tensors(folder, tensors, values, max_shard_bytes, report)
    matrices = [module_of(name) for name, info in plain.items() if len(info.shape) > 1 and name.endswith(".weight")]
    written = Written(quantization, layout, matrices, tensors, {})
    _write_settings(source, folder, tensors, written)
    return written


def _values(
    source: ModelFolder,
    plain: Mapping[str, TensorInfo],
    parts: Mapping[str, Mapping[str, tuple[str, TensorInfo]]],
    weights: Iterator[dict[str, Tensor]],
) -> Iterator[Tensor]:
    """Yield the tensors of a model, quantised weights part by part; none is held here when the next is read."""
    for name in dict.fromkeys([*source.tensors, *plain]):
        if name in plain:
            yield _read(source, plain, name)
        else:
            stored = next(weights)
            for field, (_, info) in parts[name].items():
                yield stored.pop(field).reshape(info.shape)


def _read(source: ModelFolder, tensors: Mapping[str, TensorInfo], name: str) -> Tensor:
    """Return a tensor of the source, or one that is written beside them."""
    if name in source.tensors:
        return source.read(name)
    return source.read(EMBEDDING) if name == HEAD else torch.zeros(tensors[name].shape)


def _is_exact(source: HuggingFaceSource, name: str, old: Layout, new: Layout) -> bool:
    """Return whether a weight means the same numbers in another layout, and has its scales when it is back."""
    assert source.quantization is not None
    format, stored = source.quantization.weights[name].format, source.read_stored(name)
    made = to_stored(new, from_stored(old, format, stored))
    back = to_stored(old, from_stored(new, format, made))
    return torch.equal(scaled_blocks(old, format, stored), scaled_blocks(new, format, made)) and all(
        torch.equal(back[field], stored[field].float().reshape(old.scalar)) for field in SCALES & made.keys()
    )


def _write_settings(
    source: ModelFolder, folder: Path, tensors: Mapping[str, TensorInfo], quantized: Written | None = None
) -> None:
    """Write tokenizer, configuration, and what else belongs to a model."""
    config = hugging_face_config(source, tensors, code=_copy_files(source, folder))
    if quantized is not None:
        settings = quantized.layout.json_files(quantized.quantization, quantized.plain)
        config[QUANTIZATION] = settings.pop(QUANTIZATION)
        for name, content in settings.items():
            write_json(folder / name, content)
    write_json(folder / CONFIG, config)
    ids = {key: value for key, value in source.generation.token_ids().items() if value is not None}
    write_json(folder / GENERATION_CONFIG, ids | source.generation.other)


def stored_as(source: ModelFolder, dtype: Dtype, besides: Collection[str] = ()) -> dict[str, TensorInfo]:
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


def hugging_face_config(source: ModelFolder, tensors: Mapping[str, TensorInfo], code: bool) -> dict[str, Any]:
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


def main_dtype(tensors: Mapping[str, TensorInfo]) -> torch.dtype:
    """Return the dtype that most elements have, codes and block scales of quantised weights apart."""
    elements: dict[torch.dtype, int] = {}
    for info in tensors.values():
        if info.dtype not in (torch.uint8, torch.float8_e4m3fn):
            elements[info.dtype] = elements.get(info.dtype, 0) + prod(info.shape)
    return max(elements, key=lambda dtype: elements[dtype])


def _copy_files(source: ModelFolder, target: Path) -> bool:
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
