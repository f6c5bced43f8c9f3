"""Packed conversations for a run of the program, with uneven supervised tokens, and a base that never saw a turn."""

from collections.abc import Iterator
from pathlib import Path

from datamodules.base import StageData
from modules.batch import ConversationBatch, Progress, Window
from tests.modules.helpers import conversations, document_ids

LENGTH, ROWS = 16, 8


class Conversations(StageData):
    """Eight rows a step, one at a time: some of one conversation, some of many, with few targets or many.

    Args:
        steps: optimiser steps of the run.
    """

    vocab_size, tokenizer_folder = 64, Path("nowhere")

    def __init__(self, steps: int = 8) -> None:
        super().__init__(sequence_length=LENGTH, micro_batch_size=1)
        self.total = Progress(steps=steps, tokens=steps * ROWS * LENGTH, samples=steps * ROWS)
        self.micro_batches = ROWS

    def windows(self, first: int) -> Iterator[Window]:
        for step in range(first, self.total.steps):
            batches = [self._row(ROWS * step + row) for row in range(self.rank, ROWS, self.ranks)]
            yield Window(step=step + 1, micro_batches=batches, tokens=ROWS * LENGTH, samples=ROWS)

    def chat_tokens(self) -> dict[str, int]:
        return {"<|im_start|>": 10, "<|im_end|>": 11}

    def reserved_tokens(self) -> list[int]:
        return [*range(1, 10)]

    def _row(self, number: int) -> ConversationBatch:
        lengths = [[LENGTH], [1, 15], [2] * 8, [4, 12]][number % 4]
        return conversations(document_ids(lengths), seed=number, masked=(0.1, 0.9, 0.5)[number % 3])
