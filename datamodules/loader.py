"""Rows into micro-batches, and micro-batches into the windows of optimiser steps.

Worker processes, if any, prefetch windows. They come from a fork server that has imported torch once: no fork of the
training process, no second import per worker.

Shapes: B rows of a micro-batch, T tokens in a row.
"""

import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from multiprocessing import forkserver, resource_tracker

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.text.corpus import RowReader
from datamodules.text.mixture import Mixture
from datamodules.text.rows import ConversationRow, Row
from modules.batch import IGNORED_LABEL, ConversationBatch, PackedBatch, Window


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """Which part of the rows a rank takes, and how it is cut into micro-batches."""

    rank: int
    """Rank among those that read different data."""
    ranks: int
    """Their number R; rank r takes rows r, r + R, ... of a batch."""
    micro_batch_size: int
    """B, rows in a micro-batch."""


def build_batch(rows: Sequence[Row | ConversationRow], missing: int = 0) -> PackedBatch:
    """Build a micro-batch.

    Args:
        rows: at least one, all of the same kind.
        missing: rows to add without a target (at the end of a validation set).

    Returns:
        A batch of `len(rows) + missing` rows, a `ConversationBatch` of rows of conversations.
    """
    length = len(rows[0].tokens)
    used = [int(row.lengths.sum()) for row in rows]
    # the pieces of all rows one after the other, the padding of a row being its last (maybe empty)
    pieces = np.concatenate([np.append(row.lengths, length - n) for row, n in zip(rows, used, strict=True)])
    numbers = np.concatenate([np.append(np.arange(len(row.lengths), dtype=np.int32), np.int32(length)) for row in rows])

    shape = len(rows) + missing, length
    tokens = np.zeros(shape, dtype=np.int64)
    document_ids = np.full(shape, length, dtype=np.int32)  # padding is the document T, whatever came before it
    labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
    np.stack([row.tokens for row in rows], out=tokens[: len(rows)])
    document_ids[: len(rows)] = np.repeat(numbers, pieces).reshape(len(rows), length)
    flat = labels.reshape(-1)[: len(rows) * length]
    flat[:-1] = tokens.reshape(-1)[1 : len(flat)]
    flat[np.cumsum(pieces) - 1] = IGNORED_LABEL  # the last token of a piece has no target
    for row, start in enumerate(used):
        labels[row, start:] = IGNORED_LABEL
    borders = np.concatenate([[0], np.cumsum(pieces[pieces > 0]), length * np.arange(len(rows) + 1, shape[0] + 1)])
    batch = PackedBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        document_ids=torch.from_numpy(document_ids),
        boundaries=torch.from_numpy(borders.astype(np.int32)),
    )
    return _supervise(batch, rows) if isinstance(rows[0], ConversationRow) else batch


def _supervise(batch: PackedBatch, rows: Sequence[Row | ConversationRow]) -> ConversationBatch:
    """Leave a batch the labels that the masks of its rows have, and give each the weight of its conversation."""
    weights = torch.zeros(batch.tokens.shape)
    for number, row in enumerate(rows):
        assert isinstance(row, ConversationRow)
        learnt = np.append(row.mask[1:], np.uint8(0)).astype(bool)  # of the target, which stands one to the right
        batch.labels[number, torch.from_numpy(~learnt)] = IGNORED_LABEL
        weight = np.repeat(row.weights, row.lengths)
        weights[number, : len(weight)] = torch.from_numpy(weight)
    weights[batch.labels == IGNORED_LABEL] = 0
    # field by field: asdict would copy every tensor
    return ConversationBatch(
        **{field.name: getattr(batch, field.name) for field in fields(batch)}, loss_weights=weights
    )


class Windows(Dataset[Window]):
    """The windows of one rank, by the optimiser steps before them.

    Args:
        mixture: says which rows a step has.
        readers: the sources in the order of `mixture.names`.
        share: this rank's part.
    """

    def __init__(self, mixture: Mixture, readers: list[RowReader], share: RankShare) -> None:
        self._mixture, self._readers, self._share = mixture, readers, share

    def __getitem__(self, step: int) -> Window:
        """Return the window after `step` steps."""
        share = self._share
        draws = self._mixture.draw(step)
        source, row = draws.source[share.rank :: share.ranks], draws.row[share.rank :: share.ranks]
        rows = [self._readers[s].read(r) for s, r in zip(source.tolist(), row.tolist(), strict=True)]
        size = share.micro_batch_size
        batches = [build_batch(rows[first : first + size]) for first in range(0, len(rows), size)]
        samples, length = len(draws.row), batches[0].tokens.shape[1]
        return Window(step=step + 1, micro_batches=batches, tokens=samples * length, samples=samples)

    def load(self, first: int, end: int, workers: int) -> Iterator[Window]:
        """Yield the windows after `first` steps, up to `end`, read ahead by worker processes (0: read here)."""
        context = None
        if workers:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            _start_deaf_forkserver()
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=range(first, end),
            num_workers=workers,
            multiprocessing_context=context,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=functools.partial(_end_with, os.getpid()),
            generator=torch.Generator(),  # else it draws its seed from the global generator: a resumed run would differ
        )
        return iter(loader)


class ValidationLoader:
    """Iterates a fixed set of validation rows, the same number of batches on every rank.

    Args:
        readers: the validation splits.
        rows: (reader, row) of each validation row.
        share: this rank's part; the last batches are filled up with rows without targets.
    """

    def __init__(self, readers: list[RowReader], rows: list[tuple[int, int]], share: RankShare) -> None:
        self._readers, self._rows, self._share = readers, rows, share

    def __len__(self) -> int:
        """Return the batches of each rank."""
        per_batch = self._share.ranks * self._share.micro_batch_size
        return -(-len(self._rows) // per_batch)

    def __iter__(self) -> Iterator[PackedBatch]:
        """Yield this rank's batches."""
        share = self._share
        size = share.micro_batch_size
        for batch in range(len(self)):
            numbers = range((batch * size) * share.ranks + share.rank, (batch + 1) * size * share.ranks, share.ranks)
            present = [self._rows[number] for number in numbers if number < len(self._rows)]
            # a rank with nothing left repeats a row for its shape and drops its targets
            rows = [self._readers[reader].read(row) for reader, row in present or self._rows[:1]]
            filled = build_batch(rows, size - len(rows))
            if not present:
                filled.labels.fill_(IGNORED_LABEL)
            yield filled


def _start_deaf_forkserver() -> None:
    """Start the fork server with the signals blocked that terminals and schedulers send to all processes of a job.

    Workers inherit that: the trainer, which has got the signal too, still needs their windows to the end of the step,
    and ends them then.
    """
    resource_tracker.ensure_running()  # it unblocks signals when it starts
    ending = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with(trainer: int, worker: int) -> None:
    """Let a worker end when the process `trainer` does, killed or not: its parent, the fork server, waits for it."""

    def watch() -> None:
        while True:
            time.sleep(1)
            try:
                os.kill(trainer, 0)
            except ProcessLookupError:
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
