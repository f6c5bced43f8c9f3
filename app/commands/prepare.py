"""Turn text into a corpus that `fit` trains on."""

from pathlib import Path
from typing import Literal

from datamodules.policies import Policies
from datamodules.preparation import Preparation, describe, prepare_corpus


def prepare(
    paths: list[str],
    *,
    output: Path,
    sequence_length: int = 512,
    tokenizer: Path | None = None,
    vocab_size: int = 8192,
    validation_fraction: float = 0.05,
    deduplicate: bool = True,
    encoding: Literal["strict", "replace", "skip"] = "replace",
    empty: Literal["strict", "skip"] = "skip",
    malformed: Literal["strict", "skip"] = "skip",
    oversized: Literal["strict", "split", "skip"] = "split",
    max_document_bytes: int = 1 << 20,
    text_key: str = "text",
    shard_bytes: int | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> None:
    """Turn text, Markdown, source code and JSONL into tokenised, packed rows for `fit`.

    The same command in the same folder continues after an interruption, and the result is the same to the byte. What is
    skipped or changed is counted with its reason in the summary and in OUTPUT/corpus.json.

    Args:
        paths: Files and folders to read, or the word `stdlib`: the Python standard library's sources. In folders, files
            with the suffix of a text, source code or JSONL format are taken; hidden ones are not.
        output: Folder of the corpus; give it to `fit` as data.path.
        sequence_length: Tokens in a row: what the model sees at once. Longer documents are cut, short ones share rows.
        tokenizer: Folder of a Hugging Face tokenizer; null trains a byte-level BPE on the corpus.
        vocab_size: Tokens of the vocabulary to train, at least 288.
        validation_fraction: Share of the documents held out for validation, chosen by a hash of their text; 0 holds out
            none.
        deduplicate: Whether to leave out a document whose text came before.
        encoding: Text that is not UTF-8: stop (strict), put U+FFFD for bad bytes (replace), or leave it out (skip).
        empty: Documents without a visible character: stop (strict) or leave them out (skip).
        malformed: JSONL lines that are no object with the text key, and files that cannot be read: stop (strict) or
            leave them out (skip).
        oversized: Documents over max_document_bytes: stop (strict), cut them at line ends into several documents
            (split), or leave them out (skip).
        max_document_bytes: Largest document in bytes.
        text_key: Key of the text in the objects of JSONL files.
        shard_bytes: Text that is packed together and redone if interrupted, in bytes; null chooses 2 MiB to 64 MiB.
        seed: Seed of the order of documents and rows.
        workers: Processes; null takes one per available core.
    """
    policies = Policies(
        encoding=encoding,
        empty=empty,
        malformed=malformed,
        oversized=oversized,
        max_document_bytes=max_document_bytes,
        text_key=text_key,
    )
    preparation = Preparation(
        paths=paths,
        output=output,
        sequence_length=sequence_length,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        validation_fraction=validation_fraction,
        deduplicate=deduplicate,
        policies=policies,
        shard_bytes=shard_bytes,
        seed=seed,
        workers=workers,
    )
    corpus, complete = prepare_corpus(preparation)
    if complete:
        print(f"{output} is complete already; delete it to prepare it again")
    print(describe(corpus))
