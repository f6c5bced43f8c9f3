"""Where the documents of packed rows begin and end, worked out once per forward pass and shared by all layers.

Each operation reads the form it needs: `ids` (scan, convolution), `boundaries` (attention kernels on CUDA), `spans`
(attention on a CPU), `mask` (attention on CUDA without a kernel). None is made before it is read.
"""

import functools
import itertools

from torch import Tensor

from modules.batch import document_boundaries


class DocumentLayout:
    """Document borders of packed rows.

    Args:
        ids: int32 [B, T], equal within a row exactly where the document is the same, each document contiguous.
        boundaries: `document_boundaries(ids)`, where it is known; None: worked out, which on CUDA waits for the device.
    """

    def __init__(self, ids: Tensor, boundaries: Tensor | None = None) -> None:
        self.ids = ids
        if boundaries is not None:
            self.boundaries = boundaries

    @functools.cached_property
    def boundaries(self) -> Tensor:
        """int32 [n + 1]: start of each document in the flattened [B x T] positions, then B x T."""
        return document_boundaries(self.ids)

    @functools.cached_property
    def spans(self) -> list[tuple[int, int]]:
        """(start, end) of each document in the flattened [B x T] positions, on the host."""
        return list(itertools.pairwise(self.boundaries.tolist()))

    @functools.cached_property
    def mask(self) -> Tensor:
        """Bool [B, 1, T, T]: whether a position (third axis) may attend to another (last axis)."""
        return (self.ids.unsqueeze(-1) == self.ids.unsqueeze(-2)).tril().unsqueeze(1)
