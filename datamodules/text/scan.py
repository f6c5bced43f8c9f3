"""The first step of preparation: read everything once and decide what becomes of each document.

Reading and hashing cost a few per cent of tokenising, and pay three times: exact duplicates are known before anything
is written, the validation documents are chosen by the digest of their text (so that a document stays in its split when
others come and go, and at least one is held out of a small corpus), and a resumed run knows whether the sources are
still the same.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodules.progress import ProgressBar
from datamodules.text.policies import Policies, Tally
from datamodules.text.remote import public
from datamodules.text.shards import DIGEST_BYTES, DUPLICATE, ScanJob, scan_units
from datamodules.text.sources import list_units
from datamodules.text.units import Unit
from datamodules.text.workers import Workers
from modules.errors import UserError

_SCAN_BYTES = 8 << 20
_MOST_UNITS = 10_000


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What the sources hold and what becomes of each document."""

    units: list[Unit]
    digests: list[bytes]
    """Per unit, `DIGEST_BYTES` a document."""
    sizes: list[np.ndarray]
    """Per unit, int64 [documents]: bytes."""
    fates: list[bytes]
    """Per unit one byte a document: position in `SPLITS`, or `DUPLICATE`."""
    tally: Tally
    fingerprint: str
    """Hex sha256 of the digests of the documents in the corpus, in order."""

    def kept_bytes(self, unit: int) -> int:
        """Return the bytes of a unit's documents that are in the corpus."""
        return int(self.sizes[unit][np.frombuffer(self.fates[unit], dtype=np.uint8) != DUPLICATE].sum())


def scan_sources(
    paths: list[str],
    policies: Policies,
    deduplicate: bool,
    validation_fraction: float,
    workers: Workers,
    downloads: Path,
) -> Scan:
    """Read all sources and decide which documents are for training, for validation, or left out.

    Args:
        paths: files, folders, URLs, `hf:` names, or the word `stdlib`.
        policies: what to do with bad input.
        deduplicate: whether a document whose text came before is left out.
        validation_fraction: share of the documents to hold out, in [0, 1); above 0 at least one is.
        workers: the processes that read.
        downloads: folder that keeps what URLs hold.

    Raises:
        UserError: for bad sources, or too little text to train on.
    """
    tally = Tally()
    units = list_units(paths, policies, tally, downloads)
    groups = group_sizes([unit.size for unit in units], _SCAN_BYTES)
    jobs = [ScanJob(units=[units[n] for n in group], policies=policies) for group in groups]
    digests: list[bytes] = [b""] * len(units)
    sizes: list[np.ndarray] = [np.zeros(0, dtype=np.int64)] * len(units)
    tallies: dict[int, Tally] = {}
    with ProgressBar("reading", sum(unit.size for unit in units)) as progress:
        for position, result in workers.run(scan_units, jobs):
            tallies[position] = result.tally
            for unit, unit_digests, unit_sizes in zip(groups[position], result.digests, result.sizes, strict=True):
                digests[unit], sizes[unit] = unit_digests, unit_sizes
                progress.advance(units[unit].size)
    for position in sorted(tallies):
        tally.merge(tallies[position])
    if not any(digests):
        reasons = "; ".join(f"{entry['count']} {reason}" for reason, entry in tally.skipped.items())
        raise UserError(f"paths: no document in {', '.join(map(public, paths))} ({reasons or 'nothing there'})")
    flat = _decide(b"".join(digests), deduplicate, validation_fraction)
    if not (flat == 0).any():
        size = sum(int(part.sum()) for part in sizes)
        raise UserError(
            f"paths: {np.count_nonzero(flat == 1)} document of {size} bytes in all is "
            "too little for training and validation; give more documents, a smaller max_document_bytes (cuts long "
            "ones), or validation_fraction 0"
        )
    fates = [part.tobytes() for part in np.split(flat, np.cumsum([len(part) for part in sizes])[:-1])]
    kept = hashlib.sha256()
    for unit, unit_digests, unit_sizes, unit_fates in zip(units, digests, sizes, fates, strict=True):
        for number, fate in enumerate(unit_fates):
            if fate == DUPLICATE:
                tally.skip("duplicate", unit.name, int(unit_sizes[number]))
            else:
                kept.update(unit_digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES])
    return Scan(units=units, digests=digests, sizes=sizes, fates=fates, tally=tally, fingerprint=kept.hexdigest())


def _decide(digests: bytes, deduplicate: bool, validation_fraction: float) -> np.ndarray:
    """Return uint8 [documents]: each document's fate."""
    keys = np.frombuffer(digests, dtype=f"V{DIGEST_BYTES}")
    fates = np.zeros(len(keys), dtype=np.uint8)
    if deduplicate:
        _, first = np.unique(keys, return_index=True)
        fates[:] = DUPLICATE
        fates[first] = 0
    if validation_fraction:
        # a digest read as a number in [0, 1)
        place = np.frombuffer(digests, dtype=">u8")[:: DIGEST_BYTES // 8] / 2.0**64
        place[fates == DUPLICATE] = 2
        fates[(place < validation_fraction) | (place == place.min())] = 1
    return fates


def group_sizes(sizes: list[int], limit: int) -> list[list[int]]:
    """Return consecutive positions in groups of about `limit` bytes and at most `_MOST_UNITS` members."""
    groups: list[list[int]] = []
    size = limit
    for position, amount in enumerate(sizes):
        if size >= limit or len(groups[-1]) >= _MOST_UNITS:
            groups.append([])
            size = 0
        groups[-1].append(position)
        size += amount
    return groups
