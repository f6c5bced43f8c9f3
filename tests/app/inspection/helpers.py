"""Packed rows written by hand, and a tokenizer whose tokens are the bytes."""

import functools

import torch

from app.inspection.view import BatchView, build_view
from datamodules.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from modules.batch import PackedBatch

EOS, PAD, CHAT_START, CHAT_END = 2, 0, 10, 11
NONE = -100


@functools.cache
def byte_tokenizer() -> Tokenizer:
    """32 special tokens and one token a byte."""
    return Tokenizer.train([""], SMALLEST_VOCABULARY)


def ids(text: str) -> list[int]:
    return byte_tokenizer().encode(text)


def batch(tokens: list[list[int]], labels: list[list[int]], documents: list[list[int]]) -> PackedBatch:
    return PackedBatch(
        tokens=torch.tensor(tokens),
        labels=torch.tensor(labels),
        document_ids=torch.tensor(documents, dtype=torch.int32),
    )


def view_of(
    *batches: PackedBatch, vocab_size: int = SMALLEST_VOCABULARY, losses: list[list[float]] | None = None
) -> BatchView:
    rows = sum(len(one.tokens) for one in batches)
    told = None if losses is None else [torch.tensor([one]) for one in losses]
    return build_view(batches, byte_tokenizer(), vocab_size, [f"corpus row {row}" for row in range(rows)], 1, told)


def packed() -> list[PackedBatch]:
    """Two micro-batches: "ab", "c" and padding; a document that fills its row and goes on elsewhere."""
    a, b, c, d, e, f = ids("abcdef")
    first = batch([[a, b, EOS, c, EOS, PAD]], [[b, EOS, NONE, EOS, NONE, NONE]], [[0, 0, 0, 1, 1, 2]])
    second = batch([[a, b, c, d, e, f]], [[b, c, d, e, f, NONE]], [[0] * 6])
    return [first, second]
