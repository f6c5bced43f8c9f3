"""The texts that `quantize` calibrates on, and the held-out ones that it judges the result by."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from app.models import open_corpus
from app.rows_file import read_rows
from app.scoring import Reader
from datamodules.text.corpus import Corpus, RowReader
from datamodules.text.files import is_remote
from datamodules.text.plain import format_of, read_plain
from datamodules.text.preparation import CORPUS_FILE
from modules.checkpoints.source import ModelFolder
from modules.errors import UserError

HELD_OUT = 10
"""Every so many rows of a file one is held out."""
ROW_TOKENS = 512
"""Tokens of the rows that a text file is cut into; what `prepare` takes unless told otherwise."""
JSONL = (".jsonl", ".json")


class Texts(NamedTuple):
    """Rows of token ids, each of at least two tokens."""

    calibration: list[list[int]]
    """What calibration sees."""
    held_out: list[list[int]]
    """What it does not see."""
    origin: str
    """Where they come from, and how they were split."""


def read_texts(source: ModelFolder, data: str | None, calibration_tokens: int, held_out_tokens: int) -> Texts | None:
    """Return the texts for a MODEL; None: none are given, and the run that wrote the model names none.

    Args:
        source: the MODEL.
        data: prepared folder, JSONL file or text file; None: the corpora of the run that wrote the model.
        calibration_tokens: most tokens to calibrate on.
        held_out_tokens: most tokens to judge by.

    Raises:
        UserError: the texts are damaged, of another tokenizer, or too few.
    """
    places = _run_corpora(source) if data is None else [data]
    if not places:
        return None
    limits = calibration_tokens, held_out_tokens
    if data is not None and not is_remote(data) and Path(data).is_file():
        rows = _file_rows(Path(data), Reader(source))
        calibration, held_out = _split(rows)
        origin = f"{Path(data).name}: every {HELD_OUT}th of its {len(rows):,} rows is held out"
    else:
        calibration, held_out, origin = _corpus_rows([open_corpus(place, source) for place in places], limits)
    texts = Texts(_cut(calibration, calibration_tokens), _cut(held_out, held_out_tokens), origin)
    if not texts.calibration or not texts.held_out:
        raise UserError(f"--data: {', '.join(places)} has too few rows to calibrate on some and judge by others")
    return texts


def missing_data(source: ModelFolder) -> UserError:
    """Return the error of a MODEL without texts."""
    named = ", ".join(_named_corpora(source))
    reason = f"the run's corpus {named} is not here" if named else f"{source.path} names no corpus"
    return UserError(
        f"--data: {reason}; give a folder that prepare wrote, or a JSONL or text file like those it will be used on"
    )


def _named_corpora(source: ModelFolder) -> list[str]:
    """Return the corpora that the run which wrote a model names."""
    arguments: dict[str, Any] = source.facts.get("run", {}).get("data", {}).get("init_args", {})
    sources = arguments.get("sources")
    if isinstance(sources, dict):
        return [str(entry["path"]) for entry in sources.values()]
    return [str(arguments["path"])] if arguments.get("path") else []


def _run_corpora(source: ModelFolder) -> list[str]:
    """Return the same, nothing unless all are where the run had them."""
    named = _named_corpora(source)
    here = all(is_remote(path) or (Path(path) / CORPUS_FILE).is_file() for path in named)
    return named if here else []


def _corpus_rows(corpora: Sequence[Corpus], limits: tuple[int, int]) -> tuple[list[list[int]], list[list[int]], str]:
    """Return documents of the training rows and of the held-out rows of corpora, evenly from each."""
    names = ", ".join(corpus.path.rstrip("/").rpartition("/")[2] for corpus in corpora)
    train = [corpus.rows("train") for corpus in corpora]
    validation = [corpus.rows("validation") for corpus in corpora]
    lengths = [corpus.sequence_length for corpus in corpora]
    if any(map(len, validation)):
        calibration, held_out = (
            _spread(readers, lengths, limit) for readers, limit in zip((train, validation), limits, strict=True)
        )
        return calibration, held_out, f"{names}: training rows, and held-out rows"
    calibration, held_out = _split(_spread(train, lengths, sum(limits) * HELD_OUT // (HELD_OUT - 1)))
    return calibration, held_out, f"{names}, which has no held-out rows: every {HELD_OUT}th document is taken as one"


def _spread(readers: Sequence[RowReader], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Return the documents of rows that are spaced evenly and hold about so many tokens, the same from each reader."""
    documents: list[list[int]] = []
    for reader, length in zip(readers, lengths, strict=True):
        wanted = min(len(reader), -(-tokens // (length * len(readers))))
        for place in range(wanted):
            documents += reader.documents(place * len(reader) // wanted)
    return documents


def _file_rows(file: Path, reader: Reader) -> list[list[int]]:
    """Return the rows of a JSONL file as `score` takes them, or pieces of a text file."""
    if format_of(file) in JSONL:
        return [reader.tokens(row, where).ids for where, row in read_rows(file).items()]
    try:
        text = read_plain(file).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"--data: {file} is no UTF-8 text ({error.reason} at byte {error.start})") from None
    ids = reader.tokenizer.encode(text)
    return [ids[start : start + ROW_TOKENS] for start in range(0, len(ids), ROW_TOKENS)]


def _split(rows: Sequence[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Hold out every `HELD_OUT`th row (of fewer the last); rows like one of those are in neither part."""
    step = min(HELD_OUT, max(len(rows), 1))
    held_out = list(rows[step - 1 :: step])
    known = set(map(tuple, held_out))
    return [row for row in rows if tuple(row) not in known], held_out


def _cut(rows: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """Return rows, spaced evenly, of at most so many tokens in all, the last one cut; one token predicts nothing."""
    total = max(sum(map(len, rows)), 1)
    wanted = min(len(rows), -(-len(rows) * tokens // total))
    found = []
    for place in range(wanted):
        row = rows[place * len(rows) // wanted]
        kept = row[:tokens]
        tokens -= len(kept)
        if len(kept) > 1:
            found.append(kept)
    return found
