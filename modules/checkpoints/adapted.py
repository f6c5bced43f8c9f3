"""Checkpoints of `fit` that hold adapters alone, as a MODEL: their base, and what they add to it.

Such a checkpoint says in its manifest where the base is and what it holds (`fingerprint`): over any other weights the
adapters would mean nothing. Read as a `ModelFolder` it is the merged model: W + alpha / rank x B A, worked out in
float64 and rounded once, to the dtype of W in the base, or to fp32 where W is quantised and counts as the numbers it
means.
"""

import zlib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from modules.backbone.model import Network
from modules.checkpoints import folder
from modules.checkpoints.names import TensorInfo, public_names
from modules.checkpoints.training_source import PREFIX, TrainingSource
from modules.errors import UserError
from modules.precision.lora import LoRAConfig, adapters, attach

if TYPE_CHECKING:
    from modules.checkpoints.source import ModelFolder

BASE = "base"
"""Key of the manifest of a checkpoint of adapters: `Base`."""
SAMPLE = 1 << 16
"""Bytes of a tensor that its fingerprint is made of, from its first rows on."""
WHOLE = 1 << 28
"""Bytes of a model up to which its fingerprint is made of all of it."""


class Base(NamedTuple):
    """What the adapters of a checkpoint belong to."""

    path: str
    """Folder of the MODEL, absolute, where it was when the run started."""
    fingerprint: str
    """See `fingerprint`."""


def base_of(checkpoint: Path) -> Base | None:
    """Return the base of a checkpoint's adapters; None: it is a whole model.

    Raises:
        UserError: its manifest is damaged.
    """
    about = folder.describe(checkpoint).get(BASE)
    try:
        return None if about is None else Base(path=str(about["path"]), fingerprint=str(about["fingerprint"]))
    except (TypeError, KeyError):
        raise UserError(f"{checkpoint / folder.MANIFEST}: {BASE} cannot be read; copy the checkpoint again") from None


def fingerprint(source: "ModelFolder") -> str:
    """Return a checksum of names, shapes, dtypes and values of a MODEL: all of a small one, else rows of each tensor.

    Raises:
        UserError: a tensor cannot be read.
    """
    whole = sum(prod(info.shape) * info.dtype.itemsize for info in source.tensors.values()) <= WHOLE
    checksum = 0
    for name, (shape, dtype) in source.tensors.items():
        rows = max(SAMPLE // (max(prod(shape[1:]), 1) * dtype.itemsize), 1)
        values = source.read(name, None if whole or not shape else slice(rows))
        checksum = zlib.crc32(f"{name} {list(shape)} {dtype}".encode(), checksum)
        checksum = zlib.crc32(values.contiguous().view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"


def check_base(source: "ModelFolder", base: Base, checkpoint: Path) -> None:
    """Check that a MODEL is the one that the adapters of a checkpoint were trained over.

    Raises:
        UserError: it is another one.
    """
    if fingerprint(source) != base.fingerprint:
        raise UserError(
            f"{source.path} is not the base that the adapters in {checkpoint} were trained over ({base.path}): its "
            "weights are others; name that one in model.init_args.init_from, or put it back"
        )


class AdaptedSource(TrainingSource):
    """A checkpoint folder of adapters as a `ModelFolder`: the merged model, in plain weights.

    Args:
        path: the folder.
        base: what `base_of` it names, opened.

    Raises:
        UserError: it is damaged, or its adapters do not fit the base.
    """

    def __init__(self, path: Path, base: "ModelFolder") -> None:
        self.base = base
        super().__init__(path)
        about = base_of(path)
        assert about is not None
        check_base(base, about, path)
        self._pair: tuple[str, dict[str, Tensor]] | None = None
        self.notes = [*base.notes]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """See `ModelFolder.read`."""
        parameter, expert = self._places[name]
        weight, layer = self.base.read(name, rows), parameter.removesuffix(".weight")
        if layer not in self._layers:
            return weight
        if self._pair is None or self._pair[0] != layer:
            self._pair = layer, self.read_adapter(layer)
        A, B = (matrix if expert is None else matrix[expert] for matrix in self._pair[1].values())
        delta = B[rows or slice(None)].double() @ A.double()
        return delta.mul_(self.scale).add_(weight).to(weight.dtype)

    def read_adapter(self, layer: str) -> dict[str, Tensor]:
        """Return A [r, I] and B [O, r] of an adapted layer, or those of its experts stacked, fp32."""
        return {matrix: self._load(f"{layer}.adapter.{matrix}") for matrix in "AB"}

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.lora.alpha / self.lora.rank

    @property
    def layers(self) -> list[str]:
        """Names of the adapted layers."""
        return list(self._layers)

    def _account(self) -> dict[str, TensorInfo]:
        """Check that the stored tensors are exactly the adapters of the configuration; the base has the rest."""
        self.lora = _lora(self.facts["run"], self.path / folder.RUN_CONFIG)
        with torch.device("meta"):
            network = Network(self.config)
            attach(network, self.lora)
        self._layers = dict(adapters(network))
        wanted = {
            f"{name}.adapter.{matrix}": tuple(parameter.shape)
            for name, adapter in self._layers.items()
            for matrix, parameter in adapter.named_parameters()
        }
        stored = {
            key.removeprefix(PREFIX): tuple(entry.size)
            for key, entry in self._reader.metadata.state_dict_metadata.items()
            if key.startswith(PREFIX) and isinstance(entry, TensorStorageMetadata)
        }
        if different := sorted(wanted.items() ^ stored.items()):
            raise UserError(
                f"{self.path}: its adapters are not those that {folder.RUN_CONFIG} describes ({different[0][0]}); copy "
                "the checkpoint again"
            )
        return {name: self.base.tensors[name] for name in public_names(self.config)}


def _lora(run: Mapping[str, Any], file: Path) -> LoRAConfig:
    fields = run["model"]["init_args"].get("lora")
    try:
        return LoRAConfig(**fields)
    except (TypeError, UserError) as error:
        raise UserError(f"{file}: model.init_args.lora cannot be read ({error}); copy the checkpoint again") from None
