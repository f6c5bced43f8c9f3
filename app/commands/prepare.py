"""Turn text or conversations into a corpus that `fit` trains on."""

from dataclasses import fields
from pathlib import Path
from typing import Literal

from datamodules.conversations.source import ConversationOptions, ConversationPolicies, conversation_key
from datamodules.text.policies import Policies
from datamodules.text.preparation import CORPUS_FILE, Preparation, describe, prepare_corpus
from datamodules.text.remote import STORE_SCHEMES, check_scheme, public, upload_folder
from datamodules.text.shards import work_folder
from datamodules.text.sources import first_row
from modules.checkpoints import folder
from modules.errors import UserError

TOKENIZER = "tokenizer"
"""Folder of the tokenizer in a checkpoint or a corpus."""


def prepare(
    paths: list[str],
    *,
    output: Path,
    upload: str | None = None,
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
    kind: Literal["text", "conversations"] | None = None,
    template: Path | None = None,
    mask: Literal["generated", "template"] = "generated",
    special_tokens_in_content: bool = False,
    over_long: Literal["drop", "turn", "cut"] = "drop",
    on_error: Literal["stop", "skip"] = "stop",
    thinking_off: float = 0.0,
    low_effort: float = 0.0,
    truncated_thoughts: float = 0.0,
    shard_bytes: int | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> None:
    """Turn text, Markdown, source code, JSONL, Parquet and Hugging Face datasets into tokenised, packed rows for `fit`.

    Rows of JSONL, Parquet and datasets that hold `messages`, `prompt` and `completion`, or `conversations` become rows
    for supervised fine-tuning: rendered by the chat template, with a mask of what is learnt, never split.

    The same command in the same folder continues after an interruption, and the result is the same to the byte. Other
    options, or sources that changed since, are named and refused. What is skipped or changed is counted with its reason
    in the summary and in OUTPUT/corpus.json.

    Args:
        paths: What to read, one or several of: files; folders, of which all files with the suffix of a text, source
            code, JSONL, Parquet or Jupyter format are taken, hidden ones are not, each may be compressed (.gz, .bz2,
            .xz, .zst), of a notebook the sources of its cells are taken; folders written by `Dataset.save_to_disk`;
            URLs of such files (s3, gs, azure, http, https) and, in object stores, of folders; datasets of the Hugging
            Face Hub as hf:OWNER/NAME[/CONFIG][:SPLIT], by network or from the cache in HF_HOME, the split train unless
            given; the word `stdlib`, the Python standard library's sources. What URLs hold is downloaded into OUTPUT
            until the corpus is complete.
        output: Folder of the corpus; give it to `fit` as data.path.
        upload: URL (s3, gs, azure) to copy the complete corpus to, corpus.json last; `fit` reads it there when it is
            given as data.path.
        sequence_length: Tokens in a row: what the model sees at once. Longer documents are cut, short ones share rows.
        tokenizer: MODEL (a checkpoint or run of `fit`, a Hugging Face folder) or corpus whose tokenizer to take, or
            the folder of a Hugging Face tokenizer; null trains a byte-level BPE on the corpus. Text that a MODEL goes
            on with needs the MODEL's.
        vocab_size: Tokens of the vocabulary to train, at least 288.
        validation_fraction: Share of the documents held out for validation, chosen by a hash of their text; 0 holds out
            none.
        deduplicate: Whether to leave out a document whose text came before.
        encoding: Text that is not UTF-8: stop (strict), put U+FFFD for bad bytes (replace), or leave it out (skip).
            UTF-16 and UTF-32 are decoded; a file that is binary, or mostly in another encoding, is left out (strict:
            stops).
        empty: Documents without a visible character: stop (strict) or leave them out (skip).
        malformed: JSONL lines that are no object with the text key, nulls in the text column, and files, or rows of
            them, that cannot be read: stop (strict) or leave them out (skip).
        oversized: Documents over max_document_bytes: stop (strict), cut them at line ends into several documents
            (split), or leave them out (skip).
        max_document_bytes: Largest document in bytes.
        text_key: Key of the text in the objects of JSONL files; column of the text in Parquet files and datasets.
        kind: What the sources hold: text, or conversations; null looks at the keys of their first row, but not behind
            URLs, and takes text where nothing else is found.
        template: Of conversations: Jinja file of the chat template; null takes the tokenizer's own, else one of
            Nemotron's form; it goes with the corpus's tokenizer into the checkpoints that are trained on it.
        mask: Of conversations: learn exactly what the model will have to write (generated), or what the template marks
            (template).
        special_tokens_in_content: Of conversations: whether names of special tokens inside a message become control
            tokens, as in transformers; else they are text.
        over_long: Of conversations longer than a row: leave them out (drop), end them after the last turn of the
            assistant that fits (turn), or where the row ends (cut).
        on_error: Of conversations that are malformed: stop with file, line and reason, or skip and count them by kind.
        thinking_off: Share of the conversations with thoughts that lose them and are rendered with thinking off.
        low_effort: Share of the conversations with thoughts that are rendered with low effort.
        truncated_thoughts: Share of the conversations with thoughts whose last ones end at a random budget.
        shard_bytes: Text that is packed together and redone if interrupted, in bytes; null chooses 2 MiB to 64 MiB.
        seed: Seed of the order of documents and rows.
        workers: Processes; null takes one per available core.

    Example:
        python -m app prepare examples/corpus --output data/mine
    """
    if upload is not None:
        check_scheme(upload, "upload", STORE_SCHEMES)
    text = Policies(
        encoding=encoding,
        empty=empty,
        malformed=malformed,
        oversized=oversized,
        max_document_bytes=max_document_bytes,
        text_key=text_key,
    )
    options = ConversationOptions(
        mask=mask,
        template=None if template is None else str(template),
        special_tokens_in_content=special_tokens_in_content,
        over_long=over_long,
        on_error=on_error,
        thinking_off=thinking_off,
        low_effort=low_effort,
        truncated_thoughts=truncated_thoughts,
    )
    policies = choose_policies(paths, output, kind, text, options)
    if tokenizer is None and policies.kind == "conversations":
        raise UserError("tokenizer: conversations need one with a chat template; give --tokenizer MODEL")
    preparation = Preparation(
        paths=paths,
        output=output,
        sequence_length=sequence_length,
        tokenizer=None if tokenizer is None else find_tokenizer(tokenizer),
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
        print(f"{output} is complete already, of the same sources and options: nothing to do")
    print(describe(corpus))
    if upload is not None:
        copied = upload_folder(output, upload, last=CORPUS_FILE)
        print(f"{public(upload)} has it" + (f": {copied} files copied" if copied else " already"))


def choose_policies(
    paths: list[str],
    output: Path,
    kind: Literal["text", "conversations"] | None,
    text: Policies,
    conversations: ConversationOptions,
) -> Policies:
    """Return how to read the sources: as what they were said to hold, or as what their first row looks like.

    Raises:
        UserError: options of the other kind were given.
    """
    found = None
    if kind is None:
        row = first_row(paths, work_folder(output) / "downloads") or {}
        found = None if isinstance(row.get(text.text_key), str) else conversation_key(row)
        kind = "text" if found is None else "conversations"
    unused = text if kind == "conversations" else conversations  # options that would do nothing
    for option in fields(unused):
        if getattr(unused, option.name) != option.default:
            other = "conversations" if unused is conversations else "text"
            raise UserError(f"{option.name}: is an option of {other}, and the sources hold {kind}; see --kind")
    if found is not None:
        print(f"the rows hold '{found}': taken as conversations (--kind text takes '{text.text_key}' as text)")
    return text if kind == "text" else ConversationPolicies(conversation=conversations)


def find_tokenizer(path: Path) -> Path:
    """Return the tokenizer's folder of a checkpoint, a run (of its newest checkpoint) or a corpus; others as they are.

    Raises:
        UserError: the run has no complete checkpoint.
    """
    if (path / folder.CHECKPOINTS).is_dir():
        newest, _ = folder.newest(path / folder.CHECKPOINTS)
        if newest is None:
            raise UserError(f"tokenizer: {path} has no complete checkpoint; take the corpus that it is trained on")
        path = newest
    inside = path / TOKENIZER
    if not inside.is_dir():
        return path
    print(f"tokenizer of {path}")
    return inside
