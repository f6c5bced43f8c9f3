"""The types that cross the wall between data and models, and nothing else.

Datamodules import only this file of `modules/`, so that data code can be read, tested and started without a model.
Shapes: B rows, T positions in a row, M MTP depths, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

IGNORED_LABEL = -100
"""Label of a position without a target (the last token of a document, padding, masked text)."""


@dataclass(kw_only=True)
class PackedBatch:
    """One micro-batch of rows packed with whole documents.

    Document borders reset attention, the convolution, the SSM state and the MTP targets. Padding is a document of its
    own whose labels are all `IGNORED_LABEL`.
    """

    tokens: Tensor
    """int64 [B, T]: token ids."""
    labels: Tensor
    """int64 [B, T]: the target of each position (already shifted by one), or `IGNORED_LABEL`."""
    document_ids: Tensor
    """int32 [B, T]: equal within a row exactly where the document is the same; never falls in a row; T in padding."""
    counts: Tensor
    """int64 [1 + M]: number of targets of the next token and of each MTP depth, summed over the micro-batches of this
    rank's whole accumulation window (in validation: over this batch)."""
    boundaries: Tensor | None = None
    """int32 [n + 1]: start of each of the n documents in the flattened [B x T] positions, then B x T. Follows from
    `document_ids`: a strategy adds it on the way to a GPU, which would have to be asked; None elsewhere."""

    @property
    def text_positions(self) -> Tensor:
        """int64 scalar: positions that hold text, not padding."""
        return (self.document_ids < self.tokens.shape[1]).sum()

    def pin_memory(self) -> "PackedBatch":
        """Return a copy in page-locked memory (called by `DataLoader(pin_memory=True)`)."""
        return self.map(Tensor.pin_memory)

    def tensors(self) -> dict[str, Tensor]:
        """Return the data by name: all but `boundaries`, which follow from them."""
        return {name: tensor for name, tensor in vars(self).items() if name != "boundaries"}

    def map(self, function: Callable[[Tensor], Tensor]) -> "PackedBatch":
        """Return a batch with `function` of each tensor."""
        return PackedBatch(**{name: function(tensor) for name, tensor in vars(self).items() if tensor is not None})


def next_token_labels(tokens: Tensor, document_ids: Tensor) -> Tensor:
    """Return the next-token labels of packed rows.

    Args:
        tokens: int64 [B, T].
        document_ids: int32 [B, T].

    Returns:
        int64 [B, T]: `tokens[t + 1]` where it belongs to the document of position t, else `IGNORED_LABEL`.
    """
    return shifted_labels(tokens, document_ids, 1)


def shifted_labels(labels: Tensor, document_ids: Tensor, shift: int) -> Tensor:
    """Return labels moved `shift` positions to the left inside each document (MTP depth k uses shift k).

    Args:
        labels: int64 [B, T].
        document_ids: int32 [B, T].
        shift: number of positions, >= 0.

    Returns:
        int64 [B, T]: `labels[t + shift]` where that position exists and has the document of t, else `IGNORED_LABEL`.
    """
    if shift == 0:
        return labels
    shifted = torch.full_like(labels, IGNORED_LABEL)
    same = document_ids[:, shift:] == document_ids[:, :-shift]
    shifted[:, :-shift] = torch.where(same, labels[:, shift:], IGNORED_LABEL)
    return shifted


def count_targets(labels: Tensor, document_ids: Tensor, depths: int) -> Tensor:
    """Count the targets of each loss part.

    Args:
        labels: int64 [B, T], next-token labels.
        document_ids: int32 [B, T].
        depths: number M of MTP depths.

    Returns:
        int64 [1 + M]: targets of the next token, then of MTP depths 1 to M.
    """
    parts = [shifted_labels(labels, document_ids, depth) for depth in range(depths + 1)]
    return torch.stack([(part != IGNORED_LABEL).sum() for part in parts])


class TrainingData(Protocol):
    """What a LightningModule asks of `trainer.datamodule`, handed over at run time: neither imports the other."""

    total_tokens: int
    """Length of the run in positions (rows x T), padding included."""

    @property
    def vocab_size(self) -> int:
        """Size of the tokenizer's vocabulary."""
        ...

    def tokens_at(self, step: int) -> int:
        """Return the positions consumed by all ranks after `step` optimiser steps."""
        ...

    @property
    def token_bytes(self) -> Tensor:
        """int64 [V]: UTF-8 bytes each token stands for (0 for special tokens)."""
        ...
