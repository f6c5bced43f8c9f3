"""Checkpoints that `fit` wrote, as a MODEL: fp32 masters in torch's distributed format, read tensor by tensor.

torch unpickles the index of such a checkpoint (`.metadata`) freely, so one from elsewhere could run anything. One of
ours holds tensors only; its index needs a few plain classes, and these are all that `SafeReader` admits.
"""

import io
import pickle
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from modules.backbone.config import BackboneConfig
from modules.checkpoints import folder
from modules.checkpoints.config import make_config, read_defaults
from modules.checkpoints.names import HEAD, STACKED, TensorInfo, public_names, shapes_in_files
from modules.checkpoints.quantization import Quantization
from modules.checkpoints.safetensors import check_finite
from modules.errors import UserError
from modules.precision.quantized import QuantizedWeight

TOKENIZER = "tokenizer"
PREFIX = "model.network."
"""What the strategy's and the LightningModule's names put before the network's."""
MANIFEST_KEYS = {"step": int, "last_step": int, "tokens": int, "devices": int, "torch": str}
"""What every manifest of fit says."""
ADMITTED = {
    "builtins": {"set", "frozenset", "slice"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath"},
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
}
"""Module -> names that the index of a checkpoint may refer to."""


class TrainingSource:
    """A checkpoint folder of `fit` as a `ModelFolder`.

    Args:
        path: the folder.

    Raises:
        UserError: it is damaged, or its tensors are not those of its own configuration.
    """

    def __init__(self, path: Path) -> None:
        if problem := folder.damage(path):
            raise UserError(f"{path} is damaged: {problem}; take another checkpoint of the run, or copy it again")
        self.path = path
        run = read_run(path / folder.RUN_CONFIG)
        self.config = _backbone(run, path / folder.RUN_CONFIG)
        self.facts: dict[str, Any] = {"manifest": _read_manifest(path), "run": run}
        self.notes: list[str] = []
        tokenizer = path / TOKENIZER
        self.tokenizer_folder = tokenizer if tokenizer.is_dir() else None
        self.generation = read_defaults(path, {}, self.tokenizer_folder)
        self._reader = SafeReader(path)
        self.tensors: Mapping[str, TensorInfo] = self._account()
        self.quantization: Quantization | None = None
        self._places = public_names(self.config)
        self._stacked: tuple[str, Tensor] | None = None

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """See `ModelFolder.read`; stacked experts are read together and kept until the next tensor."""
        parameter, expert = self._places[name]
        if expert is None:
            tensor = self._load(parameter)
        else:
            if self._stacked is None or self._stacked[0] != parameter:
                self._stacked = parameter, self._load(parameter)
            tensor = self._stacked[1][expert]
        return tensor if rows is None else tensor[rows]

    def read_quantized(self, name: str) -> QuantizedWeight:
        """Nothing is quantised here; see `ModelFolder.read_quantized`."""
        raise AssertionError(f"{name} is not quantised")

    def _load(self, parameter: str) -> Tensor:
        self._stacked = None  # two large tensors at a time would double the peak
        entry = self._reader.metadata.state_dict_metadata[PREFIX + parameter]
        assert isinstance(entry, TensorStorageMetadata)
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
            try:
                dcp.load({PREFIX + parameter: tensor}, storage_reader=self._reader, no_dist=True)
            except dcp.CheckpointException as error:
                failure = next(iter(error.failures.values()))[0]
                reason = (str(failure) or repr(failure)).partition("\n")[0][:120]
                raise UserError(
                    f"{self.path}: tensor {parameter} cannot be read ({reason}); take another checkpoint of the run"
                ) from None
        check_finite(tensor, parameter, self.path)
        return tensor

    def _account(self) -> dict[str, TensorInfo]:
        """Check that the stored tensors are exactly those of the configuration."""
        stored = {
            key.removeprefix(PREFIX): TensorInfo(tuple(entry.size), entry.properties.dtype)
            for key, entry in self._reader.metadata.state_dict_metadata.items()
            if key.startswith(PREFIX) and isinstance(entry, TensorStorageMetadata)
        }
        tensors = {}
        held = sum(info.shape[0] if STACKED in name else 1 for name, info in stored.items())
        shapes = shapes_in_files(self.config, held, self.path / folder.RUN_CONFIG)
        places = public_names(self.config)
        for (name, place), shape in zip(places.items(), shapes.values(), strict=True):
            if place.parameter not in stored:
                raise UserError(f"{self.path}: tensor {place.parameter} is missing; copy the checkpoint again")
            info = stored[place.parameter]
            held = info.shape if place.expert is None else info.shape[1:]
            if held != shape:
                raise UserError(
                    f"{self.path}: tensor {name} has shape {list(held)}, but {folder.RUN_CONFIG} means {list(shape)}; "
                    "one of the two is not of this checkpoint"
                )
            tensors[name] = TensorInfo(shape, info.dtype)
        known = {place.parameter for place in places.values()} | {HEAD}
        if unknown := sorted(stored.keys() - known):
            raise UserError(
                f"{self.path}: tensor {unknown[0]} is unknown to the network that {folder.RUN_CONFIG} describes"
            )
        return tensors


class SafeReader(FileSystemReader):
    """A `FileSystemReader` that admits only the classes a checkpoint of tensors needs."""

    @cached_property
    def metadata(self) -> Metadata:
        """The index of the checkpoint, read once.

        Raises:
            UserError: it is damaged, or refers to anything but the admitted classes.
        """
        path = self._get_metadata_path()
        with self.fs.create_stream(path, "rb") as stream:
            content = stream.read()
        try:
            metadata = _Unpickler(io.BytesIO(content)).load()
            if not isinstance(metadata, Metadata):
                raise TypeError(f"it holds a {type(metadata).__name__}")
        except Exception as error:  # damaged bytes are instructions to pickle, which fail in any way
            raise UserError(f"{path} is damaged or no index of a checkpoint: {error}") from error
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index; see `metadata`."""
        return self.metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in ADMITTED.get(module, ()):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


def _read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, whose facts go into a model card and decide a merge."""
    manifest = folder.describe(path)
    metrics = manifest.get("metrics", {})
    wrong = [key for key, kind in MANIFEST_KEYS.items() if type(manifest.get(key)) is not kind]
    if not isinstance(metrics, dict) or not all(type(value) in (int, float) for value in metrics.values()):
        wrong.append("metrics")
    if wrong:
        raise UserError(f"{path / folder.MANIFEST}: {wrong[0]} is missing or of the wrong type; copy it again")
    return manifest


def read_run(file: Path) -> dict[str, Any]:
    """Return the resolved configuration of a run.

    Raises:
        UserError: it cannot be read.
    """
    try:
        run = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(
            f"{file} is not valid YAML ({' '.join(str(error).split())}); copy the checkpoint again"
        ) from None
    if not isinstance(run, dict):
        raise UserError(f"{file} is no configuration of a run; copy the checkpoint again")
    return run


def _backbone(run: dict[str, Any], file: Path) -> BackboneConfig:
    try:
        fields = run["model"]["init_args"]["backbone"]
    except (KeyError, TypeError):
        fields = None
    if not isinstance(fields, dict):
        raise UserError(f"{file}: model.init_args.backbone is missing; it is no configuration that fit wrote")
    return make_config(fields, file)
