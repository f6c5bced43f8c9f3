"""A MODEL whose tensors are announced in another dtype: what a quantised folder keeps is written as it is served."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from modules.checkpoints.export import stored_as
from modules.checkpoints.names import TensorInfo
from modules.checkpoints.source import Source


class Recast:
    """A `Source` that says other dtypes than the one it reads from; whoever writes its tensors converts them.

    Args:
        source: the MODEL.
        dtype: see `export.export`.
    """

    def __init__(self, source: Source, dtype: Literal["auto", "fp32", "bf16"]) -> None:
        stored = stored_as(source, dtype)
        self._source = source
        self.path, self.config, self.facts = source.path, source.config, source.facts
        self.tokenizer_folder, self.generation, self.notes = source.tokenizer_folder, source.generation, source.notes
        self.tensors: Mapping[str, TensorInfo] = {name: stored[name] for name in source.tensors}

    def read(self, name: str) -> Tensor:
        """See `Source.read`; the dtype is that of the MODEL."""
        return self._source.read(name)
