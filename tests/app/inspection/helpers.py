"""Packed rows written by hand, and a tokenizer whose tokens are the bytes."""

import functools

import torch

from app.inspection.view import BatchView, build_view
from datamodules.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from modules.batch import ConversationBatch, PackedBatch

EOS, PAD, CHAT_START, CHAT_END, THINK, END_THINK = 2, 0, 10, 11, 12, 13
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
    origins = [f"corpus row {row}" for row in range(rows)]
    return build_view(batches, byte_tokenizer(), vocab_size, origins, 1, told, turn_ends=[CHAT_END])


def turn(text: str) -> list[int]:
    """A turn with an end: its tokens, the line break behind it included."""
    return [CHAT_START, *ids(text), CHAT_END, *ids("\n")]


def talks(*conversations: tuple[list[int], list[bool]], weights: list[float] | None = None) -> ConversationBatch:
    """A row packed with conversations, each with its tokens and whether each of them is to be written."""
    tokens = [token for words, _ in conversations for token in words]
    mask = [masked for _, words in conversations for masked in words]
    documents = [number for number, (words, _) in enumerate(conversations) for _ in words]
    labels = [
        token if taught and before == after else NONE
        for token, taught, before, after in zip(tokens[1:], mask[1:], documents, documents[1:], strict=False)
    ] + [NONE]
    given = weights or [1.0] * len(conversations)
    return ConversationBatch(
        **vars_of(batch([tokens], [labels], [documents])),
        loss_weights=torch.tensor(
            [[given[at] if label != NONE else 0.0 for at, label in zip(documents, labels, strict=True)]]
        ),
    )


def vars_of(packed: PackedBatch) -> dict[str, torch.Tensor]:
    return {name: getattr(packed, name) for name in ("tokens", "labels", "document_ids")}


def asked(question: str, answer: str) -> tuple[list[int], list[bool]]:
    """A question and an answer whose text and end are to be written."""
    words = turn(question) + turn(answer)
    at = len(turn(question)) + 1
    return words, [at <= place <= at + len(ids(answer)) for place in range(len(words))]


def packed() -> list[PackedBatch]:
    """Two micro-batches: "ab", "c" and padding; a document that fills its row and goes on elsewhere."""
    a, b, c, d, e, f = ids("abcdef")
    first = batch([[a, b, EOS, c, EOS, PAD]], [[b, EOS, NONE, EOS, NONE, NONE]], [[0, 0, 0, 1, 1, 2]])
    second = batch([[a, b, c, d, e, f]], [[b, c, d, e, f, NONE]], [[0] * 6])
    return [first, second]
