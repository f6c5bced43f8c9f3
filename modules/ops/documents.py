"""Where the documents of packed rows begin and end, worked out once per forward pass and shared by all layers.

Each operation reads the form it needs, and none is made before it is read. Only `spans` asks the device, and
`boundaries` where they are not given.
"""

import dataclasses
import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.batch import PackedBatch


def document_boundaries(ids: Tensor) -> Tensor:
    """Return int32 [n + 1], see `PackedBatch`, of int32 [B, T] ids; on CUDA this waits for the device."""
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=ids.numel()).int()


def bring_boundaries(batch: PackedBatch, moved: PackedBatch) -> PackedBatch:
    """Give a batch that was moved to a GPU its boundaries, worked out from the batch on the host."""
    if moved.document_ids.device.type != "cpu":
        known = document_boundaries(batch.document_ids)
        moved = dataclasses.replace(moved, boundaries=known.to(moved.document_ids.device, non_blocking=True))
    return moved


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

    @staticmethod
    def of_rows(rows: int, length: int, device: torch.device) -> "DocumentLayout":
        """Return the layout in which each of B rows of T positions is one document."""
        boundaries = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=device)
        return DocumentLayout(torch.zeros(rows, length, dtype=torch.int32, device=device), boundaries)

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
