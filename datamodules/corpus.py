"""Reading a prepared corpus: its metadata, its checks, random access to its rows.

Rows are read through LitData's `StreamingDataset[i]` without its shuffling, sharding and epoch machinery: which row
comes when is `mixture.py`'s business. A random row costs 14 microseconds within a chunk and 90 in another one (local
disk, `batch_decode=0`; LitData's default decodes 32 neighbours and costs ten times that), far below what a training
step needs. What can be wrong on disk is found at the start where a look at names and sizes tells, else at the row.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import litdata
import numpy as np
from litdata.streaming import downloader
from litdata.streaming.downloader import get_downloader
from litdata.utilities.dataset_utilities import get_default_cache_dir

from datamodules.preparation import CORPUS_FILE, FORMAT_VERSION, OPENINGS_FILE
from datamodules.remote import s3_endpoint, shorten
from datamodules.rows import INDEX_NAME, checksum
from datamodules.tokenizer import Tokenizer

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class RowReader:
    """Random access to the rows of one split; opened anew in each process that it is sent to.

    Args:
        folder: LitData folder or URL.
        chunk_rows: int64 [chunks], rows in each chunk.
        chunk_names: file name of each chunk.
        sequence_length: T, tokens in a row.
    """

    def __init__(self, folder: str, chunk_rows: np.ndarray, chunk_names: list[str], sequence_length: int) -> None:
        self.folder = folder
        self.chunk_rows = chunk_rows
        self._ends = np.cumsum(chunk_rows)
        self._chunk_names = chunk_names
        self._sequence_length = sequence_length
        self._dataset: litdata.StreamingDataset | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open dataset behind."""
        return vars(self) | {"_dataset": None}

    def read(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a row.

        Args:
            row: its number, below `len(self)`.

        Returns:
            int32 [T] token ids and int32 [n] tokens of each document piece; what is left of T is padding.

        Raises:
            ValueError: if the chunk does not hold a row there; the message names the file.
        """
        try:
            if self._dataset is None:
                _allow_plain_http(self.folder)
                self._dataset = litdata.StreamingDataset(self.folder, batch_decode=0)
            item = self._dataset[row]
            # copies: LitData's arrays lie in a file mapping that the next chunk closes
            tokens, lengths = np.array(item["tokens"]), np.array(item["lengths"])
            intact = checksum(tokens, lengths) == int(item["checksum"].view(np.uint32)[0])
        except Exception as error:  # LitData lets struct, index, value and OS errors through
            raise self._corrupt(row, f"{type(error).__name__}: {error}") from error
        if not intact or tokens.shape != (self._sequence_length,):
            raise self._corrupt(row, "its checksum is wrong")
        return tokens, lengths

    def _corrupt(self, row: int, reason: str) -> ValueError:
        name = self._chunk_names[int(np.searchsorted(self._ends, row, side="right"))]
        return ValueError(
            f"{os.path.join(self.folder, name)}: row {row} cannot be read ({reason.splitlines()[0]}); the chunk is "
            "corrupt: delete the corpus and prepare it again"
        )


class Corpus:
    """A folder (or URL) that `prepare` wrote.

    Args:
        path: the folder, or a URL that LitData reads (`s3://...`).

    Raises:
        ValueError: if something is missing or does not fit together; the message names the file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._local = _fetch(path) if is_remote(path) else Path(path)
        file = self._local / CORPUS_FILE
        if not file.is_file():
            raise ValueError(f"{os.path.join(path, CORPUS_FILE)} does not exist: {path} is no (complete) corpus")
        self.metadata: dict[str, Any] = _read_json(file)
        if self.metadata.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{file}: format_version is not {FORMAT_VERSION}; prepare the corpus again")
        self.sequence_length: int = self.metadata["sequence_length"]
        self.vocab_size: int = self.metadata["tokenizer"]["vocab_size"]
        self.tokenizer_folder = self._local / "tokenizer"
        self.tokenizer = Tokenizer.load(self.tokenizer_folder)
        if self.tokenizer.fingerprint != self.metadata["tokenizer"]["fingerprint"]:
            raise ValueError(f"{self.tokenizer_folder} is not the tokenizer the corpus was made with ({file})")

    def openings(self) -> list[list[int]]:
        """Return the token ids of the beginnings of some held-out documents."""
        return _read_json(self._local / OPENINGS_FILE)

    def rows(self, split: str) -> RowReader:
        """Return the reader of a split (`train` or `validation`), its files checked by name and size.

        Raises:
            ValueError: if the index or a chunk is missing, cut off, or not what `corpus.json` says.
        """
        expected = self.metadata[split]["rows"]
        folder = os.path.join(self.path, split)
        chunks: list[dict[str, Any]] = []
        if expected:
            index = self._fetch_index(split)
            chunks = _read_json(index)["chunks"]
            if sum(chunk["chunk_size"] for chunk in chunks) != expected:
                raise ValueError(f"{index}: its rows are not the {expected} of {CORPUS_FILE}; prepare the corpus again")
        if not is_remote(self.path):
            _check_sizes(folder, chunks)
        rows = np.array([chunk["chunk_size"] for chunk in chunks], dtype=np.int64)
        names = [chunk["filename"] for chunk in chunks]
        return RowReader(folder, rows, names, self.sequence_length)

    def _fetch_index(self, split: str) -> Path:
        index = self._local / split / INDEX_NAME
        if is_remote(self.path):
            _download(f"{self.path}/{split}/{INDEX_NAME}", index)
        if not index.is_file():
            raise ValueError(f"{index} does not exist; prepare the corpus again")
        return index


def is_remote(path: str) -> bool:
    """Return whether a path is one that LitData has to download."""
    return "://" in path or path.startswith("local:")


def _read_json(file: Path) -> Any:  # noqa: ANN401 (any JSON)
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}); prepare the corpus again") from None


def _check_sizes(folder: str, chunks: list[dict[str, Any]]) -> None:
    for chunk in chunks:
        file = os.path.join(folder, chunk["filename"])
        size = os.path.getsize(file) if os.path.isfile(file) else None
        if size != chunk["chunk_bytes"]:
            state = "is missing" if size is None else f"has {size} bytes instead of {chunk['chunk_bytes']}"
            raise ValueError(f"{file} {state}; delete the corpus and prepare it again")


def _fetch(url: str) -> Path:
    """Copy the small files of a remote corpus to the cache and return that folder."""
    folder = Path(get_default_cache_dir()) / f"corpus-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    _download(f"{url}/{CORPUS_FILE}", folder / CORPUS_FILE)
    _download(f"{url}/{OPENINGS_FILE}", folder / OPENINGS_FILE)
    for name in _TOKENIZER_FILES:
        required = name == _TOKENIZER_FILES[0]
        _download(f"{url}/tokenizer/{name}", folder / "tokenizer" / name, required)
    return folder


def _download(url: str, file: Path, required: bool = True) -> None:
    """Copy a small file to the cache; processes that do it at the same time do not meet each other's half."""
    _allow_plain_http(url)
    file.parent.mkdir(parents=True, exist_ok=True)
    remote, name = url.rsplit("/", 1)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        fresh = os.path.join(folder, name)
        try:
            get_downloader(remote, folder, []).download_file(url, fresh)
            os.replace(fresh, file)
        except Exception as error:  # each store has its own
            if required:
                reason = shorten(error)
                raise ValueError(f"{url} cannot be read ({type(error).__name__}: {reason})") from error
            file.unlink(missing_ok=True)


def _allow_plain_http(url: str) -> None:
    """Let LitData's obstore speak to an S3 endpoint without TLS (a store in the house); it has no option for that."""
    if url.startswith("s3://") and s3_endpoint().startswith("http://"):
        options = {**downloader._OBSTORE_CLIENT_OPTIONS, "allow_http": True}
        downloader._OBSTORE_CLIENT_OPTIONS = options  # type: ignore[assignment]
