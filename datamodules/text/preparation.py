"""From sources to a corpus: scan, train the tokenizer, write shards, finish.

The output folder holds `train/` and `validation/` (LitData), `tokenizer/` (Hugging Face files), `openings.json` (the
beginnings of some held-out documents), `sources.json` (names, sizes and times of what was read: the one file in which
copies of the same sources differ) and, written last, `corpus.json`. Until then `.preparation/` inside it keeps what
a resumed run needs. Everything is a function of the sources and the options alone, never of time, the number of
processes or interruptions: the same command gives the same bytes. Each step is redone from what is on disk:

1. scan: read all sources once (cheap beside tokenising) for digests and sizes. Exact duplicates are dropped; the
   validation documents are those with the smallest digests, so that a document stays in its split when others come and
   go. The digest of all digests is the fingerprint: sources that changed in between, or since the corpus was complete,
   are named and refused.
2. tokenizer: load one, or train one on (at most 32 MiB of) the training documents.
3. shards: consecutive units in a shuffled order; each is done when its report exists.
4. finish: LitData's indexes, the gzip figure of the held-out text, `corpus.json`.
"""

import fcntl
import json
import os
import re
import shlex
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datamodules.progress import ProgressBar
from datamodules.text.documents import read_unit
from datamodules.text.files import is_remote, remove_partial_files, write_file
from datamodules.text.hub import SYNTAX
from datamodules.text.mixture import hash64, permutation
from datamodules.text.policies import Policies, Tally
from datamodules.text.remote import public
from datamodules.text.rows import INDEX_NAME, build_index
from datamodules.text.scan import Scan, group_sizes, scan_sources
from datamodules.text.shards import SPLITS, ShardJob, held_out_path, report_path, work_folder, write_shard
from datamodules.text.sources import DEFAULT_CORPUS, survey
from datamodules.text.workers import Workers
from datamodules.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from modules.errors import UserError

CORPUS_FILE = "corpus.json"
LONGEST_ROW = 2**24
"""Most tokens in a row: sixteen times the longest context of the published models."""
OPENINGS_FILE = "openings.json"
SOURCES_FILE = "sources.json"
FORMAT_VERSION = 1
"""Raised when the layout of a corpus changes."""

_TOKENIZER_BYTES = 32 << 20
_SMALLEST_SHARD, _LARGEST_SHARD, _WANTED_SHARDS = 2 << 20, 64 << 20, 64
_MOST_OPENINGS = 64
_MOST_NAMES = 3
_COUNTS = ("documents", "bytes", "tokens", "supervised", "rows")


def check_corpus(path: str, key: str) -> None:
    """Check that a corpus on this machine is there, or will be prepared by itself.

    Args:
        path: its folder, or a URL.
        key: what names it.

    Raises:
        UserError: it is not there.
    """
    folder = Path(path)
    if is_remote(path) or folder.name == DEFAULT_CORPUS or (folder / CORPUS_FILE).is_file():
        return
    problem = f"holds no {CORPUS_FILE}, so it is no (complete) corpus" if folder.is_dir() else "does not exist"
    if folder.is_file():
        problem = "is a file, and a corpus is a folder"
    raise UserError(f"{key}: {path} {problem}; prepare it: {prepare_command(path)}")


def prepare_command(path: str, options: str = "") -> str:
    """Return the command that makes a corpus of what was named in place of one.

    Args:
        path: a place for a corpus, or texts that are none yet.
        options: further options of the command, each behind a blank.
    """
    folder = Path(path)
    texts = path.startswith("hf:") or folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    texts = texts and not work_folder(folder).is_dir()  # an interrupted preparation goes on there
    name = folder.stem if re.fullmatch(r"[\w-]+", folder.stem) else "mine"
    source, output = (path, f"data/{name}") if texts else ("FILES", path)
    source = shlex.quote(source) if texts else source
    return f"python -m app prepare {source}{options} --output {shlex.quote(output)}"


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What to prepare, and how. All but `output` and `workers` decide the content."""

    paths: list[str]
    """Files, folders, URLs, `hf:` names, or the word `stdlib`."""
    output: Path
    """Folder of the corpus."""
    sequence_length: int = 512
    """Tokens in a row, >= 2."""
    tokenizer: Path | None = None
    """Hugging Face tokenizer folder; None trains one."""
    vocab_size: int = 8192
    """Tokens of the tokenizer to train."""
    validation_fraction: float = 0.05
    """Share of the documents held out, in [0, 1)."""
    deduplicate: bool = True
    """Whether a document whose text came before is left out."""
    policies: Policies = field(default_factory=Policies)
    """How the sources are read."""
    recipe: dict[str, Any] | None = None
    """What the files in `paths` were made from, as plain JSON values; None: they are sources of their own."""
    shard_bytes: int | None = None
    """Text in a shard; None chooses by the size of the corpus (2 MiB to 64 MiB, some 64 shards)."""
    seed: int = 0
    """Seed of the order of documents and rows."""
    workers: int | None = None
    """Processes; None takes one per available core."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.paths:
            raise UserError(f"paths: give at least one file, folder, URL or {SYNTAX}, or the word '{DEFAULT_CORPUS}'")
        if self.sequence_length < 2:
            raise UserError(f"sequence_length: {self.sequence_length} leaves nothing to predict, give at least 2")
        if self.sequence_length > LONGEST_ROW:
            raise UserError(f"sequence_length: {self.sequence_length} is too long, give at most {LONGEST_ROW}")
        if self.tokenizer is None and self.vocab_size < SMALLEST_VOCABULARY:
            raise UserError(
                f"vocab_size: {self.vocab_size} is too small, {SMALLEST_VOCABULARY} ids are special tokens and bytes"
            )
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"validation_fraction: {self.validation_fraction} is not in [0, 1)")
        if self.shard_bytes is not None and self.shard_bytes < 1:
            raise UserError(f"shard_bytes: {self.shard_bytes} is not positive")
        if self.workers is not None and self.workers < 1:
            raise UserError(f"workers: {self.workers} is not positive")

    def options(self, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """Return the options that decide the content, as JSON."""
        options = asdict(self)
        del options["output"], options["workers"], options["policies"]
        options["paths"] = [public(path) for path in self.paths]
        options.update(self.policies.options(tokenizer))
        if tokenizer is not None:
            options |= {"tokenizer": tokenizer.fingerprint, "vocab_size": None}
        return options


def prepare_corpus(preparation: Preparation) -> tuple[dict[str, Any], bool]:
    """Prepare a corpus, or continue an interrupted preparation.

    Returns:
        The content of `corpus.json`, and whether the corpus was complete before.

    Raises:
        UserError: for bad sources or options, or an output folder that holds something else: other sources or options
            than these, too.
    """
    output = preparation.output
    given = None if preparation.tokenizer is None else Tokenizer.load(preparation.tokenizer)
    options = preparation.options(given)
    with _locked(output):
        if (output / CORPUS_FILE).is_file():
            corpus = json.loads((output / CORPUS_FILE).read_text())
            _check_same(corpus["options"], options, output)
            _check_unchanged(preparation, corpus["fingerprint"])
            shutil.rmtree(work_folder(output), ignore_errors=True)
            return corpus, True
        state_file = work_folder(output) / "state.json"
        state: dict[str, Any] = {}
        if state_file.is_file():
            state = json.loads(state_file.read_text())
            _check_same(state["options"], options, output)
        remove_partial_files(output)
        found = survey(preparation.paths, _downloads(output))
        with _workers(preparation) as workers:
            scan = _scan(preparation, workers)
            if state and state["fingerprint"] != scan.fingerprint:
                raise _changed(output, state.get("sources", found), found)
            state = {"options": options, "fingerprint": scan.fingerprint, "sources": found}
            write_file(state_file, json.dumps(state).encode())
            tokenizer = _make_tokenizer(preparation, given, scan)
            reports = _write_shards(preparation, tokenizer, scan, workers)
        write_file(output / SOURCES_FILE, json.dumps(found, indent=0).encode())
        corpus = _finish(preparation, options, tokenizer, scan, reports)
    return corpus, False


def check_options(preparation: Preparation) -> None:
    """Check that a complete corpus is what would be prepared, without a look at its sources or its tokenizer.

    Raises:
        UserError: it was prepared with other options; names the first.
    """
    corpus = json.loads((preparation.output / CORPUS_FILE).read_text())
    options = preparation.options(None)
    for key in ("tokenizer", "vocab_size", "template", *(() if preparation.recipe is None else ("paths",))):
        options.pop(key, None)
    _check_same(corpus["options"], options, preparation.output)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Keep others from preparing into the same folder; the lock ends with the process."""
    work = work_folder(output)
    if output.exists() and not (work.is_dir() or (output / CORPUS_FILE).is_file()):
        if not output.is_dir() or any(output.iterdir()):
            raise UserError(f"output: {output} exists and holds no corpus; choose a new or an empty folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"output: cannot make {output}: {error.strerror}; choose another folder") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise UserError(f"output: another process is preparing {output}; wait for it or choose another") from None
    try:
        yield
    finally:
        if not any(output.iterdir()):  # nothing was begun
            output.rmdir()
        os.close(descriptor)


def _downloads(output: Path) -> Path:
    return work_folder(output) / "downloads"


def _workers(preparation: Preparation) -> Workers:
    return Workers(preparation.workers or len(os.sched_getaffinity(0)))


def _scan(preparation: Preparation, workers: Workers) -> Scan:
    return scan_sources(
        preparation.paths,
        preparation.policies,
        preparation.deduplicate,
        preparation.validation_fraction,
        workers,
        _downloads(preparation.output),
    )


def _check_unchanged(preparation: Preparation, fingerprint: str) -> None:
    """Check that a complete corpus is that of the sources as they are now.

    Where names and sizes are the same and only times differ (a copy, a fresh checkout), the text is read and compared.

    Raises:
        UserError: it is not; names what changed.
    """
    output = preparation.output
    if not (output / SOURCES_FILE).is_file():
        print(f"note: {output} is of an earlier version that kept no list of its sources: they are not compared")
        return
    old = json.loads((output / SOURCES_FILE).read_text())
    now = survey(preparation.paths, _downloads(output))
    if old == now:
        return
    if {name: entry[0] for name, entry in old.items()} == {name: entry[0] for name, entry in now.items()}:
        with _workers(preparation) as workers:
            if _scan(preparation, workers).fingerprint == fingerprint:
                return
    raise _changed(output, old, now)


def _changed(output: Path, old: dict[str, Any], now: dict[str, Any]) -> UserError:
    """Return the error of sources that are not those of a corpus."""
    parts = []
    for what, names in (
        ("added", now.keys() - old.keys()),
        ("removed", old.keys() - now.keys()),
        ("changed", {name for name in old.keys() & now.keys() if old[name] != now[name]}),
    ):
        if names:
            shown = sorted(names)[:_MOST_NAMES]
            more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
            parts.append(f"{len(names)} {what} ({', '.join(shown)}{more})")
    listed = ": " + ", ".join(parts) if parts else ""
    return UserError(
        f"output: the sources changed since {output} was prepared{listed}; give another --output, or delete {output} "
        "to prepare it anew"
    )


def _check_same(old: dict[str, Any], new: dict[str, Any], output: Path) -> None:
    old, new = {"kind": "text"} | old, {"kind": "text"} | new
    for key in new:
        if old.get(key) != new[key]:
            raise UserError(
                f"{key}: {output} was prepared with {old.get(key)}, not {new[key]}; give another --output, or delete "
                f"{output} to prepare it anew"
            )


def _make_tokenizer(preparation: Preparation, given: Tokenizer | None, scan: Scan) -> Tokenizer:
    folder = preparation.output / "tokenizer"
    if not folder.is_dir():
        tokenizer = given
        if tokenizer is None:
            print("training the tokenizer", flush=True)
            tokenizer = Tokenizer.train(_training_texts(preparation, scan), preparation.vocab_size)
            if tokenizer.vocab_size < preparation.vocab_size:
                print(f"the text gives only {tokenizer.vocab_size} of {preparation.vocab_size} tokens", flush=True)
        partial = work_folder(preparation.output) / "tokenizer"
        try:
            tokenizer.save(partial)
            preparation.policies.complete(partial)
            partial.rename(folder)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"cannot write {partial}: {error.strerror}; mend that and run the same command") from error
    return Tokenizer.load(folder)


def _training_texts(preparation: Preparation, scan: Scan) -> Iterator[str]:
    room = _TOKENIZER_BYTES
    for number in permutation(len(scan.units), hash64("tokenizer", preparation.seed)):
        documents = read_unit(scan.units[number], preparation.policies, Tally())
        for document, fate in zip(documents, scan.fates[number], strict=False):
            if fate == 0:
                yield document.text
                room -= len(document.text)
                if room < 0:
                    return


def _write_shards(preparation: Preparation, tokenizer: Tokenizer, scan: Scan, workers: Workers) -> list[dict[str, Any]]:
    """Write the shards that are not done yet and return the reports of all."""
    order = permutation(len(scan.units), hash64("units", preparation.seed))
    sizes = [scan.kept_bytes(n) for n in order]
    total = sum(sizes)
    wanted = min(max(total // _WANTED_SHARDS, _SMALLEST_SHARD), _LARGEST_SHARD)
    groups = group_sizes(sizes, preparation.shard_bytes or wanted)
    reports: dict[int, dict[str, Any]] = {}
    jobs: list[ShardJob] = []
    for index, group in enumerate(groups):
        if (path := report_path(preparation.output, index)).is_file():
            reports[index] = json.loads(path.read_text())
            continue
        members = [int(order[n]) for n in group]
        job = ShardJob(
            index=index,
            units=[scan.units[n] for n in members],
            places=members,
            fates=[scan.fates[n] for n in members],
            digests=[scan.digests[n] for n in members],
            policies=preparation.policies,
            output=preparation.output,
            sequence_length=preparation.sequence_length,
            seed=preparation.seed,
            tokenizer=tokenizer.fingerprint,
        )
        jobs.append(job)
    if reports:
        print(f"continuing: {len(reports)} of {len(groups)} shards were done before", flush=True)
    done = sum(sizes[n] for index in reports for n in groups[index])
    with ProgressBar("tokenising and packing", total, done) as progress:
        for position, report in workers.run(write_shard, jobs):
            reports[jobs[position].index] = report
            progress.advance(sum(sizes[n] for n in groups[jobs[position].index]))
    return [reports[index] for index in range(len(groups))]


def _finish(
    preparation: Preparation,
    options: dict[str, Any],
    tokenizer: Tokenizer,
    scan: Scan,
    reports: list[dict[str, Any]],
) -> dict[str, Any]:
    output, kind = preparation.output, preparation.policies.kind
    tally = scan.tally
    for report in reports:
        tally.merge(Tally(skipped=report["skipped"], changed=report["changed"]))
    if not any(report["train"]["rows"] for report in reports):
        reasons = "; ".join(f"{entry['count']} {reason}" for reason, entry in tally.skipped.items())
        raise UserError(f"paths: nothing is left to train on ({reasons}); delete {output} before another try")
    stamp = str(int(scan.fingerprint[:12], 16))
    splits: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        chunks = [chunk for report in reports for chunk in report[split]["chunks"]]
        counts = {key: sum(report[split][key] for report in reports) for key in _COUNTS}
        positions = counts["rows"] * preparation.sequence_length
        splits[split] = counts | {"packing_use": counts["tokens"] / positions if positions else None}
        if chunks:
            write_file(output / split / INDEX_NAME, build_index(chunks, stamp, kind).encode())
    openings = [ids for report in reports for ids in report["openings"]][:_MOST_OPENINGS]
    write_file(output / OPENINGS_FILE, json.dumps(openings).encode())
    held_out = splits["validation"]["bytes"] if kind == "text" else 0
    compressed = _gzip_bytes(output, reports) if held_out else 0
    train = splits["train"]
    corpus = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "options": options,
        "sequence_length": preparation.sequence_length,
        "fingerprint": scan.fingerprint,
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        "documents": train["documents"] + splits["validation"]["documents"],
        "bytes": train["bytes"] + splits["validation"]["bytes"],
        "tokens": train["tokens"] + splits["validation"]["tokens"],
        **splits,
        "gzip_bits_per_byte": 8 * compressed / held_out if held_out else None,
        "skipped": tally.skipped,
        "changed": tally.changed,
    }
    write_file(output / CORPUS_FILE, (json.dumps(corpus, indent=2) + "\n").encode())
    shutil.rmtree(work_folder(output), ignore_errors=True)
    return corpus


def _gzip_bytes(output: Path, reports: list[dict[str, Any]]) -> int:
    """Return the size of what `gzip -9` makes of the held-out text, joined in the order of the sources.

    The order matters: gzip looks 32 KiB back, and neighbours in a folder resemble each other.
    """
    parts: list[tuple[int, int, int, int]] = []  # place among the sources, shard, start, length
    for shard, report in enumerate(reports):
        start = 0
        for place, length in report["held_out"]:
            parts.append((place, shard, start, length))
            start += length
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    size = 0
    for _, shard, start, length in sorted(parts):
        with open(held_out_path(output, shard), "rb") as file:
            file.seek(start)
            size += len(compressor.compress(file.read(length)))
    return size + len(compressor.flush())


def describe(corpus: dict[str, Any]) -> str:
    """Return a summary of `corpus.json` for people."""
    train, held_out = corpus["train"], corpus["validation"]
    documents = f"({train['documents']:,} training, {held_out['documents']:,} held out)"
    vocabulary = f"vocabulary {corpus['tokenizer']['vocab_size']:,})"
    tokens = corpus["tokens"]
    if corpus.get("kind", "text") == "text":
        lines = [
            f"documents    {corpus['documents']:>14,}   {documents}",
            f"text         {corpus['bytes']:>14,} bytes",
            f"tokens       {tokens:>14,}   ({corpus['bytes'] / tokens:.3f} bytes a token, {vocabulary}",
        ]
    else:
        supervised = train["supervised"] + held_out["supervised"]
        lines = [
            f"conversations{corpus['documents']:>14,}   {documents}",
            f"tokens       {tokens:>14,}   ({tokens / corpus['documents']:.1f} a conversation, {vocabulary}",
            f"supervised   {supervised:>14,}   ({supervised / tokens:.2%} of the tokens)",
        ]
    lines.append(
        f"rows         {train['rows'] + held_out['rows']:>14,}   of {corpus['sequence_length']} tokens "
        f"({train['rows']:,} training, {train['packing_use']:.2%} filled; {held_out['rows']:,} held out)"
    )
    if corpus["gzip_bits_per_byte"] is not None:
        lines.append(f"gzip -9      {corpus['gzip_bits_per_byte']:>14.3f}   bits per byte of the held-out text")
    for verb in ("skipped", "changed"):
        for reason, entry in corpus[verb].items():
            examples = ", ".join(entry["examples"])
            size = f" ({entry['bytes']:,} bytes)" if entry["bytes"] else ""
            lines.append(f"{verb:12} {entry['count']:>14,}   {reason}{size}: {examples}")
    if not corpus["skipped"]:
        lines.append("skipped                   0")
    lines.append(f"fingerprint  {corpus['fingerprint']}")
    return "\n".join(lines)
