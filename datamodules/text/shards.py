"""The two jobs of preparation that run in worker processes: scanning units and writing shards.

A scan reads units and returns a digest and a size per document: enough to find duplicates, to choose the validation
documents and to notice sources that change between an interrupted run and its resumption. A shard is the unit of work,
packing and resume: its documents are tokenised, packed, shuffled and written as LitData chunks; its report is written
last and marks it as done.
"""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.text.documents import read_unit
from datamodules.text.files import write_file
from datamodules.text.mixture import hash64, permutation
from datamodules.text.packing import pack
from datamodules.text.policies import Document, Policies, Tally
from datamodules.text.rows import Tokenized, build_chunks, build_row
from datamodules.text.units import Unit
from datamodules.tokenizer import Tokenizer
from modules.errors import UserError

SPLITS = ("train", "validation")
"""Folders of a corpus; a document's fate is the position of its split here, or `DUPLICATE`."""
DUPLICATE = 2
DIGEST_BYTES = 16
OPENING_TOKENS = 256
"""Tokens kept of the beginning of held-out documents, for sample continuations."""
OPENINGS_PER_SHARD = 8

_WORK = ".preparation"


def work_folder(output: Path) -> Path:
    """Return the folder of everything that a finished corpus does not need."""
    return output / _WORK


def report_path(output: Path, shard: int) -> Path:
    """Return where the report of a finished shard lies."""
    return work_folder(output) / f"shard-{shard:06d}.json"


def held_out_path(output: Path, shard: int) -> Path:
    """Return where the validation texts of a shard lie until they have been compressed."""
    return work_folder(output) / f"held-out-{shard:06d}.txt"


@dataclass(frozen=True, kw_only=True)
class ScanJob:
    """Units to read and digest."""

    units: list[Unit]
    policies: Policies


@dataclass(frozen=True, kw_only=True)
class ScanResult:
    """What a scan found: per unit the documents' digests and sizes."""

    digests: list[bytes]
    """Per unit, `DIGEST_BYTES` a document."""
    sizes: list[np.ndarray]
    """Per unit, int64 [documents]: UTF-8 bytes."""
    tally: Tally


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """A shard to write."""

    index: int
    units: list[Unit]
    places: list[int]
    """Per unit its place in the order of the sources."""
    fates: list[bytes]
    """Per unit one byte a document: position in `SPLITS`, or `DUPLICATE`."""
    digests: list[bytes]
    """Per unit what the scan saw."""
    policies: Policies
    output: Path
    sequence_length: int
    """T, tokens in a row."""
    seed: int
    """Seed of the order of the rows."""
    tokenizer: str
    """Fingerprint of the tokenizer in the output folder."""


def scan_units(job: ScanJob) -> ScanResult:
    """Read units and return digests and sizes of their documents."""
    tally = Tally()
    digests, sizes = [], []
    for unit in job.units:
        unit_digests, unit_sizes = [], []
        for document in read_unit(unit, job.policies, tally):
            text = document.text.encode()
            unit_digests.append(digest(text))
            unit_sizes.append(len(text))
        digests.append(b"".join(unit_digests))
        sizes.append(np.array(unit_sizes, dtype=np.int64))
    return ScanResult(digests=digests, sizes=sizes, tally=tally)


def digest(text: bytes) -> bytes:
    """Return the digest of a document's text: documents are equal when their digests are."""
    return hashlib.sha256(text).digest()[:DIGEST_BYTES]


def write_shard(job: ShardJob) -> dict[str, Any]:
    """Tokenise, pack and write a shard.

    Returns:
        Its report: for each split `documents`, `bytes`, `tokens`, `supervised` (tokens that are learnt), `rows` and
        `chunks` (entries of LitData's index); what tokenising `skipped` and `changed`, as in a `Tally`; of text
        `openings` (token ids of the beginnings of held-out documents) and `held_out`, for each unit with held-out text
        its place among the sources and the bytes of that text in the shard's file of it.

    Raises:
        UserError: if a source is not what the scan saw, or a file cannot be written.
    """
    documents = _read_again(job)
    report: dict[str, Any] = {"openings": [], "held_out": []}
    tally = Tally()
    tokens: dict[str, list[Tokenized]] = {}
    for split, name in enumerate(SPLITS):
        chosen = [document for unit in documents for document, fate in unit if fate == split]
        report[name], tokens[name] = _write_split(job, name, chosen, tally)
    report |= {"skipped": tally.skipped, "changed": tally.changed}
    if job.policies.kind == "text":
        openings = tokens["validation"][:OPENINGS_PER_SHARD]
        report["openings"] = [document.tokens[:OPENING_TOKENS].tolist() for document in openings]
        held_out = ["".join(document.text for document, fate in unit if fate == 1).encode() for unit in documents]
        report["held_out"] = [[place, len(text)] for place, text in zip(job.places, held_out, strict=True) if text]
        write_file(held_out_path(job.output, job.index), b"".join(held_out))
    write_file(report_path(job.output, job.index), json.dumps(report).encode())
    return report


def _read_again(job: ShardJob) -> list[list[tuple[Document, int]]]:
    """Return per unit the documents that are in the corpus, with their fates."""
    documents: list[list[tuple[Document, int]]] = []
    for unit, fates, expected in zip(job.units, job.fates, job.digests, strict=True):
        kept: list[tuple[Document, int]] = []
        found = hashlib.sha256()
        for number, document in enumerate(read_unit(unit, job.policies, Tally())):
            found.update(digest(document.text.encode()))
            if number < len(fates) and fates[number] != DUPLICATE:
                kept.append((document, fates[number]))
        if found.digest() != hashlib.sha256(expected).digest():
            raise UserError(f"{unit.name}: changed while it was being prepared; run the command with a new output")
        documents.append(kept)
    return documents


def _write_split(
    job: ShardJob, split: str, documents: list[Document], tally: Tally
) -> tuple[dict[str, Any], list[Tokenized]]:
    tokenizer = _load_tokenizer(job.output / "tokenizer", job.tokenizer)
    tokenized = list(job.policies.tokenize(documents, tokenizer, job.sequence_length, job.seed, tally))
    packed = pack(np.array([len(document.tokens) for document in tokenized], dtype=np.int64), job.sequence_length)
    # packing sorts by length; batches must not
    order = permutation(len(packed), hash64("rows", job.seed, job.index, split))
    rows = [build_row(packed[n], tokenized, job.sequence_length, tokenizer.pad_id) for n in order]
    chunks = []
    for number, (size, content) in enumerate(build_chunks(rows)):
        name = f"chunk-{job.index}-{number}.bin"
        write_file(job.output / split / name, content)
        chunks.append({"filename": name, "chunk_bytes": len(content), "chunk_size": size})
    report = {
        "documents": len(tokenized),
        "bytes": sum(len(document.text.encode()) for document in documents),
        "tokens": sum(len(document.tokens) for document in tokenized),
        "supervised": sum(int(document.mask.sum()) for document in tokenized if document.mask is not None),
        "rows": len(rows),
        "chunks": chunks,
    }
    return report, tokenized


@functools.lru_cache(maxsize=1)
def _load_tokenizer(folder: Path, fingerprint: str) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.fingerprint == fingerprint
    return tokenizer
