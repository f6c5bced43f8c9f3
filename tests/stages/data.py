"""Windows that vary in size and shape, with fields of their own: data as a user would write them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from datamodules.base import StageData
from modules.batch import PackedBatch, Progress, Window


@dataclass(kw_only=True)
class Annotated(PackedBatch):
    """Rows whose tokens have weights, advantages and the log-probabilities they were sampled with, fp32 [B, T]."""

    weights: Tensor
    advantages: Tensor
    sampler_log_probabilities: Tensor

    @staticmethod
    def of(batch: PackedBatch) -> "Annotated":
        names = ("weights", "advantages", "sampler_log_probabilities")
        return Annotated(**vars(batch), **dict.fromkeys(names, torch.ones(batch.tokens.shape)))


class VaryingWindows(StageData):
    """4, 8 or 12 rows of 8 to 32 tokens a step, by its number, two rows at a time.

    Args:
        steps: optimiser steps of the run.
    """

    vocab_size, tokenizer_folder = 16, Path("nowhere")

    def __init__(self, steps: int = 8) -> None:
        super().__init__(sequence_length=32, micro_batch_size=2)
        rows, lengths = zip(*(self._shape(step) for step in range(steps)), strict=True)
        tokens = sum(row * length for row, length in zip(rows, lengths, strict=True))
        self.total, self.micro_batches = Progress(steps=steps, tokens=tokens, samples=sum(rows)), 6

    def windows(self, first: int) -> Iterator[Window]:
        for step in range(first, self.total.steps):
            rows, length = self._shape(step)
            mine = torch.arange(self.rank, rows, self.ranks).split(2)
            batches = [self._batch(1000 * step + numbers, length) for numbers in mine]
            yield Window(step=step + 1, micro_batches=batches, tokens=rows * length, samples=rows)

    def _shape(self, step: int) -> tuple[int, int]:
        return 4 * (1 + step % 3), 8 * (1 + step % 4)

    def _batch(self, numbers: Tensor, length: int) -> Annotated:
        made = [torch.rand(5, length, generator=torch.Generator().manual_seed(int(number))) for number in numbers]
        tokens, labels, weights, advantages, logs = torch.stack(made, dim=1)
        labels = torch.where(labels < 0.3, -100, (16 * labels).long())
        rest = {"weights": weights, "advantages": advantages - 0.5, "sampler_log_probabilities": logs - 3.5}
        ids = torch.zeros(tokens.shape, dtype=torch.int32)
        return Annotated(tokens=(16 * tokens).long(), labels=labels, document_ids=ids, **rest)
