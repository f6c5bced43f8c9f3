"""A MODEL as a Hugging Face folder: what transformers, vLLM and the commands here load.

Each tensor keeps its bits unless another dtype is asked for, and what a source's own files say beyond the network
(sampling defaults, chat template, keys of `config.json` that change no number, licence) travels along.
"""

import shutil
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from modules.checkpoints.card import UNLIMITED, write_card
from modules.checkpoints.config import to_hugging_face
from modules.checkpoints.documents import read_json
from modules.checkpoints.names import EMBEDDING, HEAD, TensorInfo, placeholder_shapes
from modules.checkpoints.source import Source
from modules.checkpoints.writer import new_folder, write_json, write_tensors

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
CARD = "README.md"
ROUTER_BIAS = ".gate.e_score_correction_bias"
"""End of the names that stay fp32 in bf16 models: bf16 cannot hold differences below 2^-2 of values near 2^6."""
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
    """Number of tensors."""
    size: int
    """Bytes of all files."""


def export(
    source: Source,
    output: Path,
    *,
    dtype: Literal["auto", "fp32", "bf16"] = "auto",
    max_shard_bytes: int,
    report: Callable[[str], None],
) -> Exported:
    """Write a model as a Hugging Face folder; one tensor (of a fit checkpoint: one stack of experts) is in memory.

    Two kinds of tensors are written beside the model's own, as transformers (5.23) would start them at random: a tied
    head, which it does not tie, and an all-zero shared expert for mixtures that have none, which it cannot build.

    Args:
        source: the model.
        output: folder to make; appears when it is complete.
        dtype: `auto` keeps each tensor's dtype, `fp32` widens all, `bf16` gives what the open checkpoints have: bf16
            everywhere but the router bias, which is fp32.
        max_shard_bytes: most bytes of tensors in a file.
        report: gets lines of progress.

    Raises:
        ValueError: the output holds files already, or a tensor of the source is damaged.
        OSError: the disk is full; nothing is left behind.
    """
    tensors = stored_as(source, dtype)

    def read(name: str) -> Tensor:
        if name in source.tensors:
            return source.read(name)
        return source.read(EMBEDDING) if name == HEAD else torch.zeros(tensors[name].shape)

    with new_folder(output) as target:
        write_tensors(target, tensors, read, max_shard_bytes, report)
        code = _copy_files(source, target)
        write_json(target / CONFIG, hugging_face_config(source, tensors, code))
        write_json(target / GENERATION_CONFIG, generation_config(source))
        (target / CARD).write_text(write_card(source, tensors, output.absolute().name), encoding="utf-8")
        files = [path for path in target.rglob("*") if path.is_file()]
        names = sorted(str(path.relative_to(target)) for path in files)
        return Exported(names, len(tensors), sum(path.stat().st_size for path in files))


def stored_as(source: Source, dtype: Literal["auto", "fp32", "bf16"]) -> dict[str, TensorInfo]:
    """Return shape and dtype of each tensor in the folder to write; see `export`."""
    tensors = dict(source.tensors)
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
    """Return the dtype that most elements have."""
    elements: dict[torch.dtype, int] = {}
    for info in tensors.values():
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
