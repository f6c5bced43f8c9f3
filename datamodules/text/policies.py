"""How sources are read and become tokens: what to do with bad input, and the count of what was done.

Each kind of trouble has a named policy; `strict` always means: stop with an error that names the file. Whatever is
skipped or changed is counted by reason, with sizes and a few examples, and ends up in the summary and in `corpus.json`.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from datamodules.text.plain import is_text
from datamodules.text.rows import Kind, Tokenized
from datamodules.tokenizer import Tokenizer
from modules.errors import UserError

_EXAMPLES = 3


@dataclass(kw_only=True)
class Tally:
    """Counts of skipped and changed documents by reason."""

    skipped: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Reason -> `count`, `bytes`, `examples` of what is not in the corpus."""
    changed: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Reason -> the same of what is in the corpus, but not as it was."""

    def skip(self, reason: str, name: str, size: int = 0, count: int = 1) -> None:
        """Count something left out."""
        _count(self.skipped, reason, count, size, [name])

    def change(self, reason: str, name: str, size: int = 0) -> None:
        """Count something altered."""
        _count(self.changed, reason, 1, size, [name])

    def merge(self, other: "Tally") -> None:
        """Add the counts of another tally."""
        for mine, theirs in ((self.skipped, other.skipped), (self.changed, other.changed)):
            for reason, entry in theirs.items():
                _count(mine, reason, entry["count"], entry["bytes"], entry["examples"])


def _count(entries: dict[str, dict[str, Any]], reason: str, count: int, size: int, examples: list[str]) -> None:
    entry = entries.setdefault(reason, {"count": 0, "bytes": 0, "examples": []})
    entry["count"] += count
    entry["bytes"] += size
    entry["examples"] = (entry["examples"] + examples)[:_EXAMPLES]


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A text, or a stretch of one that was over the size limit; or a conversation, as JSON."""

    name: str
    """Where it came from, for messages."""
    text: str
    """Its text; encodes to UTF-8."""
    ends: bool
    """Whether the text ends here, so that an end-of-text token follows (false inside a split one)."""


@dataclass(frozen=True, kw_only=True)
class Policies:
    """How sources of text are read. What reads other sources overrides the methods."""

    kind: ClassVar[Kind] = "text"
    """What the rows will hold."""
    bad_rows: ClassVar[str] = "set malformed to skip"
    """How to go on without rows and files that cannot be read."""
    encoding: Literal["strict", "replace", "skip"] = "replace"
    """Text that is not UTF-8: stop, put U+FFFD for bad bytes (where they are few, else leave the document out), or
    leave it out. Binary files: stop, or leave them out. UTF-16 and UTF-32 are decoded."""
    empty: Literal["strict", "skip"] = "skip"
    """A document without a visible character: stop or leave it out."""
    malformed: Literal["strict", "skip"] = "skip"
    """A JSONL line that is no object with the text key, a row of a table without text, a corrupt table or stretch of
    one, a file that cannot be read: stop or leave it out."""
    oversized: Literal["strict", "split", "skip"] = "split"
    """A document over `max_document_bytes`: stop, cut it (at line ends) into documents, or leave it out."""
    max_document_bytes: int = 1 << 20
    """Largest document in bytes, >= 16."""
    text_key: str = "text"
    """Key of the text in JSONL objects; column of the text in Parquet files and datasets."""

    def __post_init__(self) -> None:
        """Check the size limit."""
        if self.max_document_bytes < 16:
            raise UserError(f"max_document_bytes: {self.max_document_bytes} is too small, give at least 16")

    def options(self, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """Return what decides the content, as JSON; the tokenizer is the one that was given, if any."""
        return asdict(self)

    def complete(self, folder: Path) -> None:
        """Add what belongs to the tokenizer of a corpus in a folder: nothing here."""

    @property
    def is_strict(self) -> bool:
        """Whether a row or file that cannot be read is an error."""
        return self.malformed == "strict"

    def text_of(self, record: dict[str, Any], name: str, size: int, tally: Tally) -> str | None:
        """Return the text of an object in a JSONL file, or None where it is to be skipped.

        Args:
            record: the object.
            name: how messages call it.
            size: bytes of its line.
            tally: takes what is skipped.
        """
        text = record.get(self.text_key)
        if isinstance(text, str):
            # JSON can spell half a surrogate pair, which no UTF-8 can hold
            return self.decode(text.encode("utf-8", "surrogatepass"), name, tally)
        return self.no_text(name, f"no string under the key '{self.text_key}'", size, tally)

    def tokenize(
        self, documents: list[Document], tokenizer: Tokenizer, capacity: int, seed: int, tally: Tally
    ) -> Iterator[Tokenized]:
        """Yield the documents as tokens, an end-of-text token behind each that ends.

        Args:
            documents: what to tokenize.
            tokenizer: the corpus's.
            capacity: T, tokens in a row; longer documents will be cut.
            seed: seed of what is drawn: nothing here.
            tally: takes what is skipped and changed: nothing here.
        """
        eos = np.array([tokenizer.eos_id], dtype=np.int32)
        texts = [document.text for document in documents]
        for document, ids in zip(documents, tokenizer.encode_documents(texts), strict=True):
            yield Tokenized(tokens=np.concatenate([ids, eos]) if document.ends else ids)

    def decode(self, data: bytes, name: str, tally: Tally, file: bool = False) -> str | None:
        """Return the text of UTF-8 bytes, or None where it is to be skipped.

        Args:
            data: the bytes.
            name: how messages call them.
            tally: takes what is skipped or changed.
            file: whether they are a file, or a stretch of one, which may be no text at all.
        """
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            if self.encoding == "strict":
                raise UserError(
                    f"{name}: byte {error.start} is not UTF-8; convert the file, or set encoding to replace or skip"
                ) from None
        text = data.decode("utf-8", errors="replace")
        if self.encoding == "skip" or (file and not is_text(text)):
            tally.skip("not UTF-8", name, len(data))
            return None
        tally.change("bad bytes replaced by U+FFFD", name, len(data))
        return text

    def binary(self, name: str, size: int, tally: Tally) -> None:
        """Count a file that is no text at all."""
        if self.encoding == "strict":
            raise UserError(f"{name}: is binary, not text; remove it, or set encoding to replace or skip")
        tally.skip("binary, not text", name, size)

    def keeps_oversized(self, name: str, size: int, tally: Tally) -> bool:
        """Return whether an oversized document is kept (split)."""
        if self.oversized == "strict":
            raise UserError(
                f"{name}: {size} bytes are over max_document_bytes ({self.max_document_bytes}); "
                "raise it, or set oversized to split or skip"
            )
        if self.oversized == "skip":
            tally.skip("over max_document_bytes", name, size)
            return False
        tally.change("over max_document_bytes, split", name, size)
        return True

    def skip_empty(self, name: str, size: int, tally: Tally) -> None:
        """Count an empty document as skipped."""
        if self.empty == "strict":
            raise UserError(f"{name}: the document is empty; remove it, or set empty to skip")
        tally.skip("empty", name, size)

    def no_text(self, name: str, reason: str, size: int, tally: Tally) -> None:
        """Count a JSONL line, or a row of a table, that holds no text."""
        if self.is_strict:
            raise UserError(f"{name}: {reason}; mend it, or {self.bad_rows}")
        tally.skip(reason, name, size)

    def corrupt(self, name: str, reason: str, count: int, tally: Tally) -> None:
        """Count a table, or `count` rows of one, that cannot be decoded."""
        if self.is_strict:
            raise UserError(f"{name}: cannot be decoded ({reason}); mend it, or {self.bad_rows}")
        tally.skip("cannot be decoded", name, count=count)

    def unreadable(self, name: str, error: OSError, tally: Tally) -> None:
        """Count a file that the system does not let us read."""
        if self.is_strict:
            raise UserError(f"{name}: {error.strerror}; mend it, or {self.bad_rows}") from None
        tally.skip(f"unreadable ({error.strerror})", name)
