"""Where the documents of packed rows begin and end, shared by all layers.

Borders are known on the host before the forward pass (`PackedBatch.boundaries`), so that no layer asks the device for
them. Each operation reads the form it needs, and none is made before it is read.
"""

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def document_boundaries(ids: Tensor) -> Tensor:
    """Return int32 [n + 1] on the host, see `PackedBatch`, of int32 [B, T] ids; on CUDA this waits for the device."""
    ids = ids.cpu()
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=ids.numel()).int()


class DocumentLayout:
    """Document borders of packed rows.

    Args:
        ids: int32 [B, T], equal within a row exactly where the document is the same, each document contiguous.
        boundaries: `document_boundaries(ids)`, on the host, where it is known; None: worked out.
    """

    def __init__(self, ids: Tensor, boundaries: Tensor | None = None) -> None:
        self.ids = ids
        self._boundaries = document_boundaries(ids) if boundaries is None else boundaries

    @staticmethod
    def of_rows(rows: int, length: int, device: torch.device) -> "DocumentLayout":
        """Return the layout in which each of B rows of T positions is one document."""
        boundaries = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32)
        return DocumentLayout(torch.zeros(rows, length, dtype=torch.int32, device=device), boundaries)

    @functools.cached_property
    def boundaries(self) -> Tensor:
        """int32 [n + 1]: start of each document in the flattened [B x T] positions, then B x T, on the device."""
        return self._boundaries.to(self.ids.device, non_blocking=True)

    @functools.cached_property
    def spans(self) -> list[tuple[int, int]]:
        """(start, end) of each document in the flattened [B x T] positions, on the host."""
        return list(itertools.pairwise(self._boundaries.tolist()))

    @functools.cached_property
    def mask(self) -> Tensor:
        """Bool [B, 1, T, T]: whether a position (third axis) may attend to another (last axis)."""
        return (self.ids.unsqueeze(-1) == self.ids.unsqueeze(-2)).tril().unsqueeze(1)
