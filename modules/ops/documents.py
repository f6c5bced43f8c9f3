"""Where the documents of packed rows begin and end, worked out once per forward pass and shared by all layers."""

import functools
import itertools

import torch
from torch import Tensor


class DocumentLayout:
    """Document borders of packed rows.

    Args:
        ids: int32 [B, T], equal within a row exactly where the document is the same, each document contiguous.
    """

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    @staticmethod
    def of_rows(rows: int, length: int, device: torch.device) -> "DocumentLayout":
        """Return the layout in which each of B rows of T positions is one document."""
        return DocumentLayout(torch.zeros(rows, length, dtype=torch.int32, device=device))

    @functools.cached_property
    def starts(self) -> Tensor:
        """Bool [B x T]: whether a document starts at the position."""
        starts = torch.ones_like(self.ids, dtype=torch.bool)
        starts[:, 1:] = self.ids[:, 1:] != self.ids[:, :-1]
        return starts.flatten()

    @functools.cached_property
    def boundaries(self) -> Tensor:
        """int32 [n + 1]: start of each document in the flattened [B x T] positions, then B x T."""
        end = torch.tensor([self.ids.numel()], device=self.ids.device)
        return torch.cat([self.starts.nonzero().flatten(), end]).int()

    @functools.cached_property
    def spans(self) -> list[tuple[int, int]]:
        """(start, end) of each document in the flattened [B x T] positions, on the host."""
        return list(itertools.pairwise(self.boundaries.tolist()))
