"""Hugging Face folders of the Nemotron-H family, as a MODEL: config.json and safetensors files."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from modules.backbone.config import BackboneConfig
from modules.checkpoints.config import CONFIG, check_family, from_hugging_face, notes, read_defaults
from modules.checkpoints.folder import read_json
from modules.checkpoints.layouts.detect import KEY as QUANTIZATION
from modules.checkpoints.layouts.detect import Found, find_layout
from modules.checkpoints.names import (
    HEAD,
    MTP,
    PLACEHOLDER_WIDTH,
    SHARED,
    TensorInfo,
    placeholder_shapes,
    shapes_in_files,
)
from modules.checkpoints.quantization import (
    REPORT,
    Quantization,
    dequantize_stored,
    from_stored,
    may_be_quantized,
    module_of,
)
from modules.checkpoints.quantized_layers import StoredLayer, check_settings, fused_notes, kv_scales, separate
from modules.checkpoints.safetensors import Entry, check_finite, read_folder
from modules.errors import UserError
from modules.precision.quantized import QuantizedWeight

IN_MEMORY = re.compile(r"^model\.")
TOKENIZERS = ("tokenizer.json", "tokenizer.model")


class HuggingFaceSource:
    """A Hugging Face folder as a `ModelFolder`.

    Args:
        path: the folder.

    Raises:
        UserError: config.json or a weight file is damaged, or the tensors are not exactly those it describes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        raw = read_json(path / CONFIG)
        check_family(raw, path / CONFIG)
        self.notes = notes(raw, path / CONFIG)
        found = find_layout(path, raw)
        self.layout = None if found is None else found.layout
        entries = read_folder(path, quantized=found is not None)
        self._layers: dict[str, StoredLayer] = {}
        caches: dict[str, Entry] = {}
        if found is not None:
            entries, self._layers, caches = separate(_public(entries), found.layout)
        self._entries = entries
        told = self._told_by_tensors({key: value for key, value in raw.items() if key != QUANTIZATION})
        self.config = self._without_placeholders(from_hugging_face(told, path / CONFIG))
        self.tensors: Mapping[str, TensorInfo] = self._account()
        self.quantization = None if found is None else self._quantization(found, caches)
        self.facts: dict[str, Any] = {"config": raw}
        if (path / REPORT).exists():
            self.facts["quantization"] = read_json(path / REPORT)
        self.tokenizer_folder = path if any((path / name).exists() for name in TOKENIZERS) else None
        self.generation = read_defaults(path, raw, self.tokenizer_folder)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """See `ModelFolder.read`."""
        if name in self._layers:
            assert self.layout is not None
            stored = self._layers[name]
            return dequantize_stored(self.layout, stored.layer.format, stored.read(rows))
        entry = self._entries[name]
        tensor = entry.read(rows)
        check_finite(tensor, name, entry.file)
        return tensor

    def read_quantized(self, name: str) -> QuantizedWeight:
        """See `ModelFolder.read_quantized`."""
        assert self.layout is not None
        stored = self._layers[name]
        return from_stored(self.layout, stored.layer.format, stored.read())

    def read_stored(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a quantised weight as they are stored, by field of `QuantizedWeight`."""
        return self._layers[name].read()

    def _quantization(self, found: Found, caches: Mapping[str, Entry]) -> Quantization:
        """Check the configuration against the tensors, and return what is quantised."""
        attention = [module_of(module_of(name)) for name in self.tensors if name.endswith(".k_proj.weight")]
        stated = any(settings.kv for settings in found.settings)
        scales, lines = kv_scales(caches, attention, found.layout, stated, self.path)
        layers = {name: self._layers[name] for name in self.tensors if name in self._layers}
        quantization = Quantization({name: layer.layer for name, layer in layers.items()}, scales)
        plain = [
            name for name, (shape, _) in self.tensors.items() if name not in layers and may_be_quantized(name, shape)
        ]
        for settings in found.settings:
            lines += check_settings(settings, quantization, plain)
        self.notes += [*lines, *fused_notes(layers, self.path)]
        return quantization

    def _told_by_tensors(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Return config.json with what only the tensors can tell.

        A head in the file is not tied. transformers' save_pretrained drops the MTP block. And transformers builds a
        shared expert whatever n_shared_experts says, other engines do not.
        """
        raw = dict(raw)
        held = self._entries.keys() | self._layers.keys()
        if HEAD in held:
            raw["tie_word_embeddings"] = False
        if raw.get("num_nextn_predict_layers") and not any(name.startswith(MTP) for name in held):
            raw["num_nextn_predict_layers"] = 0
            self.notes.append(f"{self.path}: the files hold no MTP weights, so the network has no MTP block")
        if not (raw.get("n_shared_experts", 1) and raw.get("moe_shared_expert_intermediate_size", 1)):
            raw["n_shared_experts"] = int(any(SHARED in name for name in held))
        return raw

    def _without_placeholders(self, config: BackboneConfig) -> BackboneConfig:
        """Return the configuration without shared experts that are the zero tensors of `placeholder_shapes`."""
        if config.moe_shared_expert_intermediate_size != PLACEHOLDER_WIDTH:
            return config
        without = dataclasses.replace(config, moe_shared_expert_intermediate_size=0)
        shapes = placeholder_shapes(without)
        entries = [self._entries.get(name) for name in shapes]
        if not shapes or any(entry is None or entry.read().any() for entry in entries):
            return config
        self._entries = {name: entry for name, entry in self._entries.items() if name not in shapes}
        return without

    def _account(self) -> dict[str, TensorInfo]:
        """Check that the tensors in the files are exactly those of the configuration."""
        held = {name: (entry.file, entry.info) for name, entry in self._entries.items()}
        held |= {name: (layer.parts["codes"][1].file, layer.info) for name, layer in self._layers.items()}
        shapes = shapes_in_files(self.config, len(held), self.path / CONFIG)
        if unexpected := [name for name in held if name not in shapes]:
            raise UserError(
                f"{held[unexpected[0]][0]}: {_count(unexpected)} not part of the network that {CONFIG} "
                f"describes ({unexpected[0]}); {_mend(unexpected[0])}"
            )
        if missing := [name for name in shapes if name not in held]:
            raise UserError(
                f"{self.path}: {_count(missing)} missing in its weight files ({missing[0]}); {CONFIG} is of another "
                "network, or a file is missing: download it again"
            )
        for name, shape in shapes.items():
            file, (stored, _) = held[name]
            if stored != shape:
                raise UserError(
                    f"{file}: tensor {name} has shape {list(stored)}, but {CONFIG} means {list(shape)}; one of the two "
                    "files is not of this model: download both again"
                )
        return {name: held[name][1] for name in shapes}


def _public(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Return the tensors of a quantised folder by public name: some tools save it under the names in memory."""
    public: dict[str, Entry] = {}
    for name, entry in entries.items():
        new = IN_MEMORY.sub("backbone.", name)
        if new in public:
            raise UserError(f"{entry.file}: tensor {new} is there under two names, the other is {name}; remove one")
        public[new] = entry
    return public


def _count(names: list[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _mend(name: str) -> str:
    if name.startswith("model."):
        return "the names are those in transformers' memory: save it with save_original_format=True"
    if name.startswith(MTP):
        return "if it is an MTP block, set num_nextn_predict_layers to 1"
    if "scale" in name:
        return "quantised weights of this kind cannot be read: take the model in bf16"
    return "download the folder again"
