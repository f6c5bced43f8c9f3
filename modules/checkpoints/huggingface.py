"""Hugging Face folders of the Nemotron-H family, as a MODEL: config.json and safetensors files."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from modules.backbone.config import BackboneConfig
from modules.checkpoints.config import check_family, from_hugging_face, notes
from modules.checkpoints.defaults import read_defaults
from modules.checkpoints.documents import read_json
from modules.checkpoints.names import (
    HEAD,
    MTP,
    PLACEHOLDER_WIDTH,
    SHARED,
    TensorInfo,
    placeholder_shapes,
    shapes_in_files,
)
from modules.checkpoints.safetensors import read_entry, read_folder
from modules.checkpoints.values import check_finite

CONFIG = "config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")


class HuggingFaceSource:
    """A Hugging Face folder as a `Source`.

    Args:
        path: the folder.

    Raises:
        ValueError: config.json or a weight file is damaged, or the tensors are not exactly those it describes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        raw = read_json(path / CONFIG)
        check_family(raw, path / CONFIG)
        self.notes = notes(raw, path / CONFIG)
        self._entries = read_folder(path)
        self.config = self._without_placeholders(from_hugging_face(self._told_by_tensors(raw), path / CONFIG))
        self.tensors: Mapping[str, TensorInfo] = self._account()
        self.facts: dict[str, Any] = {"config": raw}
        self.tokenizer_folder = path if any((path / name).exists() for name in TOKENIZERS) else None
        self.generation = read_defaults(path, raw, self.tokenizer_folder)

    def read(self, name: str) -> Tensor:
        """See `Source.read`."""
        entry = self._entries[name]
        tensor = read_entry(entry)
        check_finite(tensor, name, entry.file)
        return tensor

    def _told_by_tensors(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Return config.json with what only the tensors can tell.

        A head in the file is not tied. transformers' save_pretrained drops the MTP block. And transformers builds a
        shared expert whatever n_shared_experts says, other engines do not.
        """
        raw = dict(raw)
        if HEAD in self._entries:
            raw["tie_word_embeddings"] = False
        if raw.get("num_nextn_predict_layers") and not any(name.startswith(MTP) for name in self._entries):
            raw["num_nextn_predict_layers"] = 0
            self.notes.append(f"{self.path}: the files hold no MTP weights, so the network has no MTP block")
        if not (raw.get("n_shared_experts", 1) and raw.get("moe_shared_expert_intermediate_size", 1)):
            raw["n_shared_experts"] = int(any(SHARED in name for name in self._entries))
        return raw

    def _without_placeholders(self, config: BackboneConfig) -> BackboneConfig:
        """Return the configuration without shared experts that are the zero tensors of `placeholder_shapes`."""
        if config.moe_shared_expert_intermediate_size != PLACEHOLDER_WIDTH:
            return config
        without = dataclasses.replace(config, moe_shared_expert_intermediate_size=0)
        shapes = placeholder_shapes(without)
        entries = [self._entries.get(name) for name in shapes]
        if not shapes or any(entry is None or read_entry(entry).any() for entry in entries):
            return config
        self._entries = {name: entry for name, entry in self._entries.items() if name not in shapes}
        return without

    def _account(self) -> dict[str, TensorInfo]:
        """Check that the tensors in the files are exactly those of the configuration."""
        shapes = shapes_in_files(self.config, len(self._entries), self.path / CONFIG)
        if unexpected := [name for name in self._entries if name not in shapes]:
            raise ValueError(
                f"{self._entries[unexpected[0]].file}: {_count(unexpected)} not part of the network that {CONFIG} "
                f"describes ({unexpected[0]}); {_mend(unexpected[0])}"
            )
        if missing := [name for name in shapes if name not in self._entries]:
            raise ValueError(
                f"{self.path}: {_count(missing)} missing in its weight files ({missing[0]}); {CONFIG} is of another "
                "network, or a file is missing: download it again"
            )
        for name, shape in shapes.items():
            file, (stored, _), _ = self._entries[name]
            if stored != shape:
                raise ValueError(
                    f"{file}: tensor {name} has shape {list(stored)}, but {CONFIG} means {list(shape)}; one of the two "
                    "files is not of this model: download both again"
                )
        return {name: self._entries[name].info for name in shapes}


def _count(names: list[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _mend(name: str) -> str:
    if name.startswith("model."):
        return "the names are those in transformers' memory: save it with save_original_format=True"
    if name.startswith(MTP):
        return "if it is an MTP block, set num_nextn_predict_layers to 1"
    if "scale" in name:
        return "quantised weights cannot be read: take the model in bf16"
    return "download the folder again"
