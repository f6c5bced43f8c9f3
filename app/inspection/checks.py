"""What is silently wrong in a batch: each check is a sentence about labels, borders, ids or counts."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from app.inspection.view import BatchView, Document, Row, is_next
from datamodules.conversations.control import THOUGHT
from datamodules.conversations.masks import check_mask
from datamodules.conversations.messages import ConversationError
from modules.batch import IGNORED_LABEL

SHOWN = 5
"""Places named in a warning."""

Place = tuple[int, int | None]
"""(row, first position or None for the whole row)."""


def warnings(view: BatchView) -> list[str]:
    """Return one line for each kind of trouble in the batch, with the rows and first positions where it is found."""
    found: dict[str, list[Place]] = {}
    for row in view.rows:
        for what, position in _check_row(row, view):
            found.setdefault(what, []).append((row.number, position))
    return [f"{what}: {_places(places)}" for what, places in found.items()]


def mask_errors(view: BatchView, turn_end: int, generated: bool) -> list[str]:
    """Return one line for each conversation whose mask cannot be meant.

    These are the checks of preparation, so that what they find was broken, or made by other means, since.

    Args:
        view: the batch, of conversations.
        turn_end: token that ends a turn.
        generated: whether all rows were prepared to teach what a model has to write, and nothing a template inserts.
    """
    found: list[str] = []
    for row in view.rows:
        for number, document in enumerate(row.documents):
            if not document.padding and (reason := _mask_error(row, document, view, turn_end, generated)):
                place = f"row {row.number}" + (f" ({row.origin})" if row.origin else "")
                found.append(f"{place}, conversation {number} from position {document.start}: {reason}")
    return found


def _mask_error(row: Row, document: Document, view: BatchView, turn_end: int, generated: bool) -> str | None:
    """Return what is wrong with the mask of a conversation, if anything."""
    tokens, learnt = (column[document.start : document.end].numpy() for column in (row.tokens, row.supervised))
    if learnt[-1] and not document.complete:  # cut in the middle of a turn, as the policy for over-long ones says
        tokens, learnt = np.append(tokens, turn_end), np.append(learnt, True)
    try:
        check_mask(tokens, learnt, turn_end, [view.vocabulary.text(index) for index in tokens.tolist()])
    except ConversationError as error:
        return error.reason
    opening, closing = map(view.vocabulary.special_id, THOUGHT)
    inserted = (tokens[:-1] == opening) & (tokens[1:] == closing) & learnt[:-1]
    return "the mask holds an empty thought, which a template inserts" if generated and inserted.any() else None


def _check_row(row: Row, view: BatchView) -> Iterator[tuple[str, int | None]]:
    """Yield (trouble, first position) of a row."""
    tokens, labels, ids = row.tokens, row.labels, row.document_ids
    has_loss = labels != IGNORED_LABEL
    if not has_loss.any():
        yield "no position has a loss, the row trains nothing", None
    for what, wrong in (
        (
            f"token id outside the model's vocabulary of {view.vocab_size:,} (model.backbone.vocab_size)",
            (tokens < 0) | (tokens >= view.vocab_size),
        ),
        (
            f"label outside the model's vocabulary of {view.vocab_size:,} (model.backbone.vocab_size)",
            has_loss & ((labels < 0) | (labels >= view.vocab_size)),
        ),
        ("label is not the next token of the same document", has_loss & ~is_next(labels, tokens, ids)),
    ):
        if (position := _first(wrong)) is not None:
            yield what, position
    if (position := _first_unknown(row, view)) is not None:
        yield "token id that the tokenizer does not use", position
    yield from _check_documents(row, view)


def _check_documents(row: Row, view: BatchView) -> Iterator[tuple[str, int | None]]:
    vocabulary, seen = view.vocabulary, set()
    for document in row.documents:
        tokens = row.tokens[document.start : document.end]
        chat = vocabulary.chat_start_id is not None and bool((tokens == vocabulary.chat_start_id).any())
        if document.id in seen:
            yield "document id comes back after another document's", document.start
        seen.add(document.id)
        if chat and not view.conversations and document.with_loss >= document.length - 1:
            yield "conversation with loss on every token, prompts included", document.start
        if not chat and (ends := _first(tokens[:-1] == vocabulary.eos_id)) is not None and not document.padding:
            yield "end token inside a document: texts without a border between them", document.start + ends
        if document.with_loss and document.length > 1 and bool((tokens == vocabulary.pad_id).all()):
            yield "padding with loss", document.start


def _first(wrong: Tensor) -> int | None:
    positions = torch.nonzero(wrong).flatten()
    return int(positions[0]) if len(positions) else None


def _first_unknown(row: Row, view: BatchView) -> int | None:
    unknown = [index for index in set(row.tokens.tolist()) if not view.vocabulary.knows(index)]
    return _first(torch.isin(row.tokens, torch.tensor(unknown, dtype=torch.int64)))


def _places(places: list[Place]) -> str:
    named = [f"row {row}" + ("" if at is None else f" from position {at}") for row, at in places[:SHOWN]]
    rest = len({row for row, _ in places[SHOWN:]})
    return ", ".join(named) + (f" and {rest} more" if rest else "")
