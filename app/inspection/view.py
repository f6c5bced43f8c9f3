"""A batch as the model sees it, made of packed micro-batches and a tokenizer and nothing of the stage they belong to.

Rows, documents and positions are numbered from 0, as in the tensors. A document of a row is a stretch of equal document
ids; padding is the last one of a row if all its tokens are the padding token and none has a label. In rows of
conversations a document is a conversation, and marked as having loss are the tokens that the model is taught to write:
there one looks for the end of a turn. In rows of text they are the positions with a label, nearly all.
Shapes: B rows of a micro-batch, T positions in a row, M MTP depths.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from app.inspection.tokens import Token, Vocabulary
from datamodules.tokenizer import Tokenizer
from modules.batch import IGNORED_LABEL, ConversationBatch, PackedBatch, count_targets, shifted_labels

CONTEXT = 6
"""Tokens that are shown before one whose loss stands out."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """A document, or a piece of one, in a row."""

    id: int
    start: int
    """First position."""
    end: int
    """Position after the last one."""
    padding: bool
    with_loss: int
    """Positions with a label."""
    complete: bool
    """Whether its last token (of a conversation: but for blanks) is one that ends documents; a piece that was cut has
    none."""
    weight: float | None
    """Weight of a conversation, as it was prepared; None: a text."""
    share: float
    """Share of it in the step's loss, the weights of its tokens together."""

    @property
    def length(self) -> int:
        """Positions."""
        return self.end - self.start

    @property
    def noun(self) -> str:
        """What it is called."""
        return "document" if self.weight is None else "conversation"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the batch."""

    number: int
    """Number in the batch, over all micro-batches."""
    micro_batch: int
    place: int
    """Number in its micro-batch."""
    origin: str
    """Where its text comes from; empty if that is not known."""
    tokens: Tensor
    """int64 [T]."""
    labels: Tensor
    """int64 [T], `IGNORED_LABEL` where there is no loss."""
    document_ids: Tensor
    """int32 [T]."""
    loss_weights: Tensor
    """fp32 [T]: with which weight the nats of each position enter the loss of the step."""
    supervised: Tensor
    """bool [T]: the tokens that are shown as having loss: in rows of text the positions with a label, in conversations
    the tokens that are one."""
    documents: list[Document]
    """In order, padding included."""
    losses: Tensor | None
    """fp32 [T]: nats of each position's label, where they are known."""

    def targets(self, depths: int) -> list[list[int]]:
        """Return the labels of the next token and of MTP depths 1 to `depths`, [1 + M][T]."""
        labels, ids = self.labels[None], self.document_ids[None]
        return [shifted_labels(labels, ids, depth)[0].tolist() for depth in range(depths + 1)]

    def own_losses(self) -> list[float | None]:
        """Return the loss of each of the T tokens in nats: that of the position before, whose label it was.

        None: it was no label (the first token of a document, one without loss), or losses are not known.
        """
        if self.losses is None:
            return [None] * len(self.tokens)
        labelled = taught(self.labels, self.tokens, self.document_ids)[1:]
        found = zip(self.losses[:-1].tolist(), labelled.tolist(), strict=True)
        return [None, *(loss if is_label else None for loss, is_label in found)]

    def shown(self, vocabulary: Vocabulary) -> list[Token]:
        """Return how each of the T tokens is shown; characters do not reach over a document's border."""
        ids = self.tokens.tolist()
        return [token for part in self.documents for token in vocabulary.show(ids[part.start : part.end])]


@dataclass(frozen=True, kw_only=True)
class BatchView:
    """The rows of one optimiser step (of one device), and what can be said about them."""

    rows: list[Row]
    micro_batches: int
    counted: list[int]
    """[1 + M]: the targets of each loss part in these rows."""
    vocabulary: Vocabulary
    vocab_size: int
    """V, ids that the model has a row of the embedding for."""
    conversations: bool
    """Whether the rows hold conversations, not texts."""

    @property
    def depths(self) -> int:
        """M, MTP depths."""
        return len(self.counted) - 1

    @property
    def positions(self) -> int:
        """Positions of all rows."""
        return sum(row.tokens.numel() for row in self.rows)

    @cached_property
    def documents(self) -> list[Document]:
        """The documents of all rows, without padding."""
        return [document for row in self.rows for document in row.documents if not document.padding]

    @property
    def padding(self) -> int:
        """Positions of padding."""
        return self.positions - sum(document.length for document in self.documents)


def build_view(
    micro_batches: Sequence[PackedBatch],
    tokenizer: Tokenizer,
    vocab_size: int,
    origins: Sequence[str],
    depths: int,
    token_losses: Sequence[Tensor] | None = None,
    loss_weights: Sequence[Tensor] | None = None,
    turn_ends: Collection[int] = (),
) -> BatchView:
    """Return the view of a window.

    Args:
        micro_batches: at least one, all with the same T.
        tokenizer: what the text was tokenised with.
        vocab_size: V of the model.
        origins: where each row comes from, over all micro-batches.
        depths: M, MTP depths to count targets for.
        token_losses: fp32 [B, T] of each micro-batch, where they are known.
        loss_weights: fp32 [B, T] of each micro-batch: with which weight the nats of each position enter the loss of the
            step; None: the loss is the mean over all targets of the rows.
        turn_ends: tokens that end an assistant's turn; only conversations have some.
    """
    vocabulary = Vocabulary(tokenizer)
    counted = sum(count_targets(batch.labels, batch.document_ids, depths) for batch in micro_batches)
    assert isinstance(counted, Tensor)
    if loss_weights is None:
        loss_weights = [(batch.labels != IGNORED_LABEL) / counted[0].clamp(min=1) for batch in micro_batches]
    rows: list[Row] = []
    for number, batch in enumerate(micro_batches):
        for place, (tokens, labels, ids) in enumerate(zip(batch.tokens, batch.labels, batch.document_ids, strict=True)):
            own = batch.loss_weights[place] if isinstance(batch, ConversationBatch) else None
            row = Row(
                number=len(rows),
                micro_batch=number,
                place=place,
                origin=origins[len(rows)],
                tokens=tokens,
                labels=labels,
                document_ids=ids,
                loss_weights=loss_weights[number][place],
                supervised=labels != IGNORED_LABEL if own is None else taught(labels, tokens, ids),
                documents=_documents(tokens, labels, ids, vocabulary, loss_weights[number][place], own, turn_ends),
                losses=None if token_losses is None else token_losses[number][place],
            )
            rows.append(row)
    return BatchView(
        rows=rows,
        micro_batches=len(micro_batches),
        counted=counted.tolist(),
        vocabulary=vocabulary,
        vocab_size=vocab_size,
        conversations=isinstance(micro_batches[0], ConversationBatch),
    )


def taught(labels: Tensor, tokens: Tensor, document_ids: Tensor) -> Tensor:
    """Return bool [T]: the tokens that are the label of the position before them, of a row (all [T])."""
    return torch.cat([torch.zeros(1, dtype=torch.bool), is_next(labels, tokens, document_ids)[:-1]])


def is_next(labels: Tensor, tokens: Tensor, document_ids: Tensor) -> Tensor:
    """Return bool [T]: whether the label is the token after the position, in the same document; of a row (all [T])."""
    right = torch.zeros_like(labels, dtype=torch.bool)
    right[:-1] = (labels[:-1] == tokens[1:]) & (document_ids[:-1] == document_ids[1:])
    return right


def _documents(
    tokens: Tensor,
    labels: Tensor,
    ids: Tensor,
    vocabulary: Vocabulary,
    loss_weights: Tensor,
    own_weights: Tensor | None,
    turn_ends: Collection[int],
) -> list[Document]:
    starts = [0, *(torch.nonzero(ids[1:] != ids[:-1]).flatten() + 1).tolist()]
    documents = []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        with_loss = int((labels[start:end] != IGNORED_LABEL).sum())
        filler = end == len(ids) and not with_loss and bool((tokens[start:end] == vocabulary.pad_id).all())
        part = slice(start, end)
        words = tokens[part].tolist()
        while own_weights is not None and len(words) > 1 and vocabulary.text(words[-1]).isspace():
            words.pop()  # what a template puts behind the end of a turn
        documents.append(
            Document(
                id=int(ids[start]),
                start=start,
                end=end,
                padding=filler,
                with_loss=with_loss,
                complete=words[-1] in (vocabulary.eos_id, *turn_ends),
                weight=None if own_weights is None else float(own_weights[part].max()),
                share=float(loss_weights[part].sum()),
            )
        )
    return documents


def summary(view: BatchView) -> list[tuple[str, str]]:
    """Return (what, value) lines about the whole batch."""
    lengths = sorted(document.length for document in view.documents)
    cut = sum(not document.complete for document in view.documents)
    micro_batches, rows, documents = view.micro_batches, len(view.rows), len(lengths)
    noun = "conversations" if view.conversations else "documents"
    ends = "the end of a turn: they were cut" if view.conversations else "the end token: they go on in another row"
    lines = [
        ("rows", f"{rows:,} of {view.positions // rows:,} positions, in {_plural(micro_batches, 'micro-batch', 'es')}"),
        ("positions", f"{view.positions:,}"),
        ("with loss", f"{view.counted[0]:,} ({share(view.counted[0], view.positions)})"),
        ("padding", f"{view.padding:,} ({share(view.padding, view.positions)})"),
        (noun, f"{documents:,} ({documents / rows:.1f} a row)"),
    ]
    if lengths:
        middle = lengths[len(lengths) // 2]
        lines += [
            ("lengths", f"{lengths[0]:,} to {lengths[-1]:,} tokens, median {middle:,}"),
            ("cut", f"{cut:,} ({share(cut, documents)}) do not end with {ends}"),
        ]
    parts = ["next token", *(f"MTP depth {depth}" for depth in range(1, view.depths + 1))]
    counted = [f"{part} {count:,}" for part, count in zip(parts, view.counted, strict=True)]
    return [*lines, ("targets", ", ".join(counted))]


def largest_losses(view: BatchView, count: int) -> list[tuple[Row, int, float]]:
    """Return the labels that were predicted worst, as (row, position that predicts, nats), the worst first.

    What is not a number comes before all others.
    """
    found = [
        (row, position, loss)
        for row in view.rows
        if row.losses is not None
        for position, loss in enumerate(row.losses.tolist())
        if row.labels[position] != IGNORED_LABEL
    ]
    return sorted(found, key=lambda one: (one[2] == one[2], -one[2]))[:count]


def loss_line(view: BatchView, row: Row, position: int, loss: float) -> str:
    """Return where and on what a loss came about."""
    start = next(document.start for document in row.documents if document.end > position)
    ids = row.tokens[max(start, position - CONTEXT + 1) : position + 1].tolist()
    before = "".join(token.line for token in view.vocabulary.show(ids))
    (label,) = view.vocabulary.show([int(row.labels[position])])
    return f"{loss:6.2f} nats  row {row.number} position {position}: '{label.line}' after '{before}'"


def share(part: int, whole: int) -> str:
    """Return a share in percent; nothing is 0% and everything 100%, whatever the rounding."""
    percent = 100 * part / max(whole, 1)
    if part and percent < 0.05:
        return "under 0.1%"
    if part < whole and percent >= 99.95:
        return "over 99.9%"
    return f"{percent:.1f}%"


def heading(row: Row) -> str:
    """Return the line above a row, without its number."""
    documents = [document for document in row.documents if not document.padding]
    padding = len(row.tokens) - sum(document.length for document in documents)
    with_loss = sum(document.with_loss for document in row.documents)
    parts = [
        row.origin,
        f"micro-batch {row.micro_batch}, row {row.place} in it",
        _plural(len(documents), row.documents[0].noun),
        f"{with_loss:,} of {len(row.tokens):,} positions with loss",
        f"{padding:,} padding" if padding else "no padding",
    ]
    return "; ".join(filter(None, parts))


def caption(document: Document, number: int) -> str:
    """Return the line above a document that is the `number`-th of its row."""
    if document.padding:
        return f"padding: positions {document.start:,}-{document.end - 1:,}, {_plural(document.length, 'token')}"
    parts = [
        f"{document.noun} {number}: positions {document.start:,}-{document.end - 1:,}",
        _plural(document.length, "token"),
        f"{document.with_loss:,} with loss",
        *([] if document.weight is None else [f"weight {document.weight:g}, {document.share:.2%} of the step's loss"]),
        *([] if document.complete else ["cut at its end"]),
    ]
    return ", ".join(parts)


def _plural(count: int, noun: str, ending: str = "s") -> str:
    return f"{count:,} {noun}{'' if count == 1 else ending}"
