"""Reading a prepared corpus: its metadata, its checks, random access to its rows.

Which row comes when is `mixture.py`'s business, so rows are read by number. Chunks (LitData's format) are mapped into
memory by ourselves, as many as the mixture reads side by side: a random row costs some 20 microseconds of processor
time. LitData's `StreamingDataset[i]` maps and unmaps a file at each change of chunk (200 microseconds), and asks an
object store twice for each row. Chunks behind a URL are downloaded whole, by LitData's downloaders, into its cache.
What can be wrong on disk is found at the start where a look at names and sizes tells, else at the row.
"""

import functools
import hashlib
import json
import os
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock

from datamodules.text.files import is_remote
from datamodules.text.mixture import LANES
from datamodules.text.preparation import CORPUS_FILE, FORMAT_VERSION, OPENINGS_FILE
from datamodules.text.remote import explain, public, s3_endpoint
from datamodules.text.rows import INDEX_NAME, ConversationRow, CorruptRowError, Kind, Row, read_row
from datamodules.tokenizer import Tokenizer
from modules.errors import UserError

if TYPE_CHECKING:
    from litdata.streaming.downloader import Downloader

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_OPEN_CHUNKS = 2 * LANES
_MOST_DOWNLOADS = 8


class RowReader:
    """Random access to the rows of one split; opened anew in each process that it is sent to.

    Args:
        folder: folder or URL of the chunks.
        cache: where chunks behind a URL are kept, as long as they are open (some gigabytes at most); None for a folder.
        chunks: entries of LitData's index.
        sequence_length: T, tokens in a row.
        kind: what the rows hold.
    """

    def __init__(
        self, folder: str, cache: Path | None, chunks: list[dict[str, Any]], sequence_length: int, kind: Kind
    ) -> None:
        self.folder = folder
        self._kind: Kind = kind
        self.chunk_rows = np.array([chunk["chunk_size"] for chunk in chunks], dtype=np.int64)
        """int64 [chunks], rows in each chunk."""
        self._ends = np.cumsum(self.chunk_rows)
        self._cache = cache
        self._files = [(chunk["filename"], chunk["chunk_bytes"]) for chunk in chunks]
        self._sequence_length = sequence_length
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open chunks behind."""
        return vars(self) | {"_open": OrderedDict()}

    def read(self, row: int) -> Row | ConversationRow:
        """Return a row, views of the file: not to be written to.

        Args:
            row: its number, below `len(self)`.

        Raises:
            UserError: if the chunk does not hold a row there, or cannot be read; the message names the file.
        """
        chunk = int(self._ends.searchsorted(row, side="right"))
        try:
            words = self._open.get(chunk)
            if words is None:
                words = self._map(chunk)
            number = row - int(self._ends[chunk] - self.chunk_rows[chunk])
            return read_row(words, number, self._sequence_length, self._kind)
        except (OSError, RuntimeError, CorruptRowError) as error:
            file = os.path.join(public(self.folder), self._files[chunk][0])
            raise UserError(
                f"{file}: row {row} cannot be read ({str(error).splitlines()[0]}); the chunk is corrupt: delete the "
                "corpus and prepare it again"
            ) from error

    def documents(self, row: int) -> list[list[int]]:
        """Return the token ids of each document piece of a row; see `read`."""
        tokens, lengths = self.read(row)[:2]
        ends = np.cumsum(lengths).tolist()
        return [tokens[start:end].tolist() for start, end in zip([0, *ends], ends, strict=False)]

    def _map(self, chunk: int) -> np.ndarray:
        """Map a chunk into memory, the longest open one making room, and return its int32 words."""
        name, size = self._files[chunk]
        words = _map_file(Path(self.folder) / name, size) if self._cache is None else self._map_cached(name, size)
        self._open[chunk] = words
        if len(self._open) > _OPEN_CHUNKS:
            old, _ = self._open.popitem(last=False)
            if self._cache is not None:
                (self._cache / self._files[old][0]).unlink(missing_ok=True)
        return words

    def _map_cached(self, name: str, size: int) -> np.ndarray:
        """Map a remote chunk, downloaded again where another process made room between its download and its mapping.

        A mapped file outlives its name, so each process removes the chunks it is done with and asks no other.
        """
        assert self._cache is not None
        file = self._cache / name
        for _ in range(_MOST_DOWNLOADS):
            _download_once(f"{self.folder}/{name}", file)
            try:
                return _map_file(file, size)
            except RuntimeError as error:  # all that torch raises
                if "No such file" not in str(error):
                    raise
        raise UserError(f"{file} is removed from the cache as soon as it is there")


class Corpus:
    """A folder (or URL) that `prepare` wrote.

    Args:
        path: the folder, or a URL that LitData reads (`s3://...`).

    Raises:
        UserError: if something is missing or does not fit together; the message names the file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._local = _fetch(path) if is_remote(path) else Path(path)
        file = self._local / CORPUS_FILE
        if not file.is_file():
            raise UserError(f"{os.path.join(path, CORPUS_FILE)} does not exist: {path} is no (complete) corpus")
        self.metadata: dict[str, Any] = _read_json(file)
        if self.metadata.get("format_version") != FORMAT_VERSION:
            raise UserError(f"{file}: format_version is not {FORMAT_VERSION}; prepare the corpus again")
        self.sequence_length: int = self.metadata["sequence_length"]
        self.kind: Kind = self.metadata.get("kind", "text")
        self.vocab_size: int = self.metadata["tokenizer"]["vocab_size"]
        self.tokenizer_folder = self._local / "tokenizer"
        self.tokenizer = Tokenizer.load(self.tokenizer_folder)
        if self.tokenizer.fingerprint != self.metadata["tokenizer"]["fingerprint"]:
            raise UserError(f"{self.tokenizer_folder} is not the tokenizer the corpus was made with ({file})")

    def openings(self) -> list[list[int]]:
        """Return the token ids of the beginnings of some held-out documents."""
        return _read_json(self._local / OPENINGS_FILE)

    def rows(self, split: str) -> RowReader:
        """Return the reader of a split (`train` or `validation`), its files checked by name and size.

        Raises:
            UserError: if the index or a chunk is missing, cut off, or not what `corpus.json` says.
        """
        expected = self.metadata[split]["rows"]
        folder = os.path.join(self.path, split)
        chunks: list[dict[str, Any]] = []
        if expected:
            index = self._fetch_index(split)
            chunks = _read_json(index)["chunks"]
            if sum(chunk["chunk_size"] for chunk in chunks) != expected:
                raise UserError(f"{index}: its rows are not the {expected} of {CORPUS_FILE}; prepare the corpus again")
        if not is_remote(self.path):
            _check_sizes(folder, chunks)
        cache = self._local / split if is_remote(self.path) else None
        return RowReader(folder, cache, chunks, self.sequence_length, self.kind)

    def _fetch_index(self, split: str) -> Path:
        index = self._local / split / INDEX_NAME
        if is_remote(self.path):
            _download_once(f"{self.path}/{split}/{INDEX_NAME}", index)
        if not index.is_file():
            raise UserError(f"{index} does not exist; prepare the corpus again")
        return index


def _map_file(file: Path, size: int) -> np.ndarray:
    """Map a file of `size` bytes into memory and return its int32 words."""
    # torch keeps no file open, as mmap and numpy.memmap do: 128 for each source would be too many
    return torch.from_file(str(file), shared=False, size=size // 4, dtype=torch.int32).numpy()


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); prepare the corpus again") from None


def _check_sizes(folder: str, chunks: list[dict[str, Any]]) -> None:
    for chunk in chunks:
        file = os.path.join(folder, chunk["filename"])
        size = os.path.getsize(file) if os.path.isfile(file) else None
        if size != chunk["chunk_bytes"]:
            state = "is missing" if size is None else f"has {size} bytes instead of {chunk['chunk_bytes']}"
            raise UserError(f"{file} {state}; delete the corpus and prepare it again")


def _fetch(url: str) -> Path:
    """Copy the small files of a remote corpus to the cache and return that folder: a new one for another corpus."""
    from litdata.utilities.dataset_utilities import get_default_cache_dir

    cache = Path(get_default_cache_dir())
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        _download(f"{url}/{CORPUS_FILE}", Path(folder) / CORPUS_FILE)
        described = (Path(folder) / CORPUS_FILE).read_bytes()
    folder = cache / f"corpus-{hashlib.sha256(url.encode() + described).hexdigest()[:16]}"
    _download_once(f"{url}/{CORPUS_FILE}", folder / CORPUS_FILE)
    _download_once(f"{url}/{OPENINGS_FILE}", folder / OPENINGS_FILE)
    for name in _TOKENIZER_FILES:
        required = name == _TOKENIZER_FILES[0]
        _download_once(f"{url}/tokenizer/{name}", folder / "tokenizer" / name, required)
    return folder


def _download_once(url: str, file: Path, required: bool = True) -> None:
    """Copy a remote file to the cache where it is not there; the processes of a machine wait for the first."""
    if file.is_file():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if not file.is_file():
            _download(url, file, required)


def _download(url: str, file: Path, required: bool = True) -> None:
    """Copy a remote file; it is there completely or not at all."""
    remote, name = url.rsplit("/", 1)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        fresh = os.path.join(folder, name)
        try:
            _downloader(remote).download_file(url, fresh)
            os.replace(fresh, file)
        except Exception as error:  # each store has its own
            if required:
                raise UserError(f"{public(url)} cannot be read ({explain(url, error)})") from error


@functools.cache
def _downloader(remote: str) -> "Downloader":
    """Return LitData's downloader of a remote folder: it keeps its connections."""
    from litdata.streaming import downloader

    if remote.startswith("s3://") and s3_endpoint().startswith("http://"):
        # a store in the house without TLS: LitData has no option to let obstore speak to it
        options = {**downloader._OBSTORE_CLIENT_OPTIONS, "allow_http": True}
        downloader._OBSTORE_CLIENT_OPTIONS = options
    return downloader.get_downloader(remote, tempfile.gettempdir(), [])
