"""Hugging Face folders of the Nemotron-H family, as a MODEL: config.json and safetensors files."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from modules.backbone.config import BackboneConfig
from modules.checkpoints.config import from_hugging_face, unknown_keys
from modules.checkpoints.defaults import read_defaults
from modules.checkpoints.documents import read_json
from modules.checkpoints.names import HEAD, MTP, TensorInfo, public_shapes
from modules.checkpoints.safetensors import read_entry, read_folder
from modules.checkpoints.values import check_finite

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"


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
        self._entries = read_folder(path)
        self.notes: list[str] = []
        self.config = self._resolve(from_hugging_face(raw, path / CONFIG))
        if unknown := unknown_keys(raw):
            self.notes.append(f"{path / CONFIG}: unknown keys are ignored: {', '.join(unknown)}")
        self.facts: dict[str, Any] = {"config": raw}
        self.tokenizer_folder = path if (path / TOKENIZER).exists() else None
        self.generation = read_defaults(path, raw, self.tokenizer_folder)
        self.tensors = self._account()

    def read(self, name: str) -> Tensor:
        """See `Source.read`."""
        entry = self._entries[name]
        tensor = read_entry(entry)
        check_finite(tensor, name, entry.file)
        return tensor

    def _resolve(self, config: BackboneConfig) -> BackboneConfig:
        """Return the configuration with what only the tensors can tell: a head of its own, and no MTP block."""
        if config.tie_word_embeddings and HEAD in self._entries:
            config = dataclasses.replace(config, tie_word_embeddings=False)
        if config.num_nextn_predict_layers and not any(name.startswith(MTP) for name in self._entries):
            config = dataclasses.replace(config, num_nextn_predict_layers=0)
            self.notes.append(f"{self.path}: it holds no MTP weights, so the network has no MTP block")
        return config

    def _account(self) -> dict[str, TensorInfo]:
        """Check that the tensors in the files are exactly those of the configuration."""
        shapes = public_shapes(self.config)
        if missing := [name for name in shapes if name not in self._entries]:
            raise ValueError(
                f"{self.path}: {_count(missing)} missing ({missing[0]}); {CONFIG} describes another network, or a file "
                "is missing: download it again"
            )
        if unexpected := [name for name in self._entries if name not in shapes]:
            entry = self._entries[unexpected[0]]
            raise ValueError(
                f"{entry.file}: {_count(unexpected)} not part of the network that {CONFIG} describes ({unexpected[0]})"
            )
        for name, shape in shapes.items():
            entry = self._entries[name]
            if entry.info.shape != shape:
                raise ValueError(
                    f"{entry.file}: tensor {name} has shape {list(entry.info.shape)}, but {CONFIG} means {list(shape)}; "
                    "one of the two is not of this model"
                )
        return {name: self._entries[name].info for name in shapes}


def _count(names: list[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
