"""A MODEL: a folder that `fit` wrote or a Hugging Face folder, told apart here and alike from here on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from modules.backbone.config import BackboneConfig
from modules.checkpoints import folder
from modules.checkpoints.adapted import AdaptedSource, Base, base_of
from modules.checkpoints.config import CONFIG, GenerationDefaults
from modules.checkpoints.huggingface import HuggingFaceSource
from modules.checkpoints.names import TensorInfo
from modules.checkpoints.quantization import Quantization
from modules.checkpoints.training_source import TrainingSource, read_run
from modules.errors import UserError
from modules.precision.quantized import QuantizedWeight


class ModelFolder(Protocol):
    """A model on the disk."""

    path: Path
    """Its folder; for a run's folder the checkpoint that was taken from it."""
    config: BackboneConfig
    """The network's shape, as the folder says and its tensors confirm."""
    tokenizer_folder: Path | None
    """Folder with the tokenizer's files; None: there are none."""
    generation: GenerationDefaults
    """Special tokens and settings of generation."""
    facts: dict[str, Any]
    """What a model card can say: manifest and resolved configuration of a run, or the raw config.json."""
    notes: list[str]
    """What the user should know of how the folder was read, one line each; shown once by `open_model`'s callers."""
    tensors: Mapping[str, TensorInfo]
    """By public name, in the order of `public_names(config)`: complete, checked against `config`. A quantised weight
    is here by the name of the weight, with the shape of the layer and as fp32."""
    quantization: Quantization | None
    """What of it is quantised; None: nothing is."""

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return a tensor on the CPU in the dtype it is stored in; of a quantised weight the numbers it means, in fp32.

        Args:
            name: a key of `tensors`.
            rows: these along dimension 0; None: all.

        Raises:
            UserError: it cannot be read, or holds values that are not finite; names file, tensor and mend.
        """
        ...

    def read_quantized(self, name: str) -> QuantizedWeight:
        """Return a quantised weight; `name` is in `quantization.weights`.

        Raises:
            UserError: see `read`.
        """
        ...


def open_model(path: Path) -> ModelFolder:
    """Open a MODEL; no tensor is read yet, but all are accounted for.

    Args:
        path: a checkpoint that `fit` wrote, a run's folder (its newest undamaged checkpoint is taken), or a Hugging
            Face folder of the Nemotron-H family.

    Raises:
        UserError: it is none of them, or damaged; one line that names the file and the mend.
    """
    folder.check_model(path)
    if (path / folder.INDEX).exists() or (path / folder.MANIFEST).exists():
        return _open_checkpoint(path.parent / path.readlink() if path.is_symlink() else path)
    if (path / CONFIG).exists():
        return HuggingFaceSource(path)
    return _newest(path)


def open_base(base: Base, checkpoint: Path, given: Path | None = None) -> ModelFolder:
    """Open the MODEL that the adapters of a checkpoint belong to.

    Args:
        base: what the checkpoint says of it.
        checkpoint: the checkpoint.
        given: where the configuration says it is; looked at where it is not at `base.path`.

    Raises:
        UserError: it is at neither place, or cannot be read.
    """
    path = Path(base.path)
    if not path.is_dir() and given is not None and given.is_dir():
        path = given
    if not path.is_dir():
        raise UserError(f"{checkpoint} holds adapters alone, and their base {path} is not there; put it back")
    return open_model(path)


def _open_checkpoint(path: Path) -> TrainingSource:
    problem = folder.damage(path)
    base = None if problem else base_of(path)
    if base is None:
        return TrainingSource(path)
    run = read_run(path / folder.RUN_CONFIG)
    given = run["model"]["init_args"].get("init_from")
    return AdaptedSource(path, open_base(base, path, None if given is None else Path(str(given))))


def _newest(run: Path) -> TrainingSource:
    """Open the newest undamaged checkpoint of a run."""
    path, damaged = folder.newest(run / folder.CHECKPOINTS)
    if path is None:
        problems = "; ".join(f"{path.name}: {problem}" for path, problem in damaged)
        state = f"({problems})" if damaged else "yet: train it with fit first"
        raise UserError(f"{run} has no complete checkpoint {state}; or name another MODEL")
    source = _open_checkpoint(path)
    source.notes = [
        *source.notes,
        *(
            f"warning: {other} is damaged and passed over: {problem}; {path.name} is taken"
            for other, problem in damaged
        ),
    ]
    return source
