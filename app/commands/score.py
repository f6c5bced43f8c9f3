"""Per-token log-probabilities of given texts, completions, conversations or a corpus; the distance to another model."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from app.options import Device, Dtype, InputFile, Model, OutputFile, for_people, short_dtype
from app.rows_file import Answers, open_answers, read_rows
from modules.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from app.scoring import Tokens
    from datamodules.text.corpus import Corpus
    from modules.backbone.model import Network
    from modules.checkpoints.source import ModelFolder
    from modules.generation.scoring import Scores

WINDOW_BATCHES = 16
"""Batches of tokens that are sorted by length together, and written together."""


def score(
    model: Model,
    *,
    input: InputFile | None = None,
    output: OutputFile | None = None,
    data: str | None = None,
    validation_rows: int | None = None,
    reference: Model | None = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    batch_tokens: int = 8192,
) -> None:
    """Write per-token log-probabilities, and print perplexity, bits per byte and KL.

    With --data, the held-out rows of a prepared corpus are scored and only the figures printed: loss and bits per byte
    are those of `validate`, of any MODEL with the corpus's tokenizer.

    Else a row of the input, a JSON object a line, holds one of these, the first that fits: `token_ids` (and
    `completion_start`); `completion` or `completion_ids` after `prompt`, `prompt_ids` or `messages`; `messages` that
    end with the assistant's turn; `text`. Prompt and completion are tokenised each by itself, as `generate` does it;
    ids are used as they are. Texts begin with BOS only where the tokenizer says so; nothing is put at their end.

    A row of the output has the keys of its input row and: `token_ids`; `logprobs` (natural log, one for each token
    after the first: logprobs[i] is that of token_ids[i+1]); where there is a completion, `completion_start`, its first
    position in token_ids (a conversation's completion is the last turn with its end mark); `tokenizer`, the fingerprint
    of the tokenizer (a row whose ids another one wrote, as `generate` marks them, is refused); with --reference, `kl`,
    one for each log-probability. Blank lines are passed over. Perplexity and the other figures of the last line are
    over the completion where a row has one, else over all tokens after the first; bits per byte are over the bytes of
    the same tokens.

    The same command goes on where it was stopped. OUTPUT.run.json beside the output keeps settings and figures.

    Args:
        model: MODEL: a folder that fit wrote (checkpoint or run) or a Hugging Face folder.
        input: JSONL file to read, plain or compressed (.gz, .bz2, .xz, .zst); - is standard input.
        output: JSONL file to write, rows in the order of the input; - is standard output (figures go to stderr).
        data: In place of --input and --output: a folder that `prepare` wrote, or its URL.
        validation_rows: Held-out rows of --data to take, evenly spaced; null: all.
        reference: MODEL with the same tokenizer: adds `kl`, KL(reference || model) in nats over the whole vocabulary.
        dtype: Format of the matrix products: auto is that of each weight in the checkpoint, and runs a quantised model
            as it is served, its inputs quantised too; fp32 and bf16 run it with dequantised weights. Log-probabilities
            are always computed in fp32 from the logits.
        device: Where to compute; auto takes a GPU if there is one.
        batch_tokens: Tokens in one forward pass, padding included: bounds the memory. Longer rows go through in pieces.

    Raises:
        UserError: a file, row or option is wrong; the message names it and the mend.

    Example:
        python -m app score runs/pretrain --input out.jsonl --output scores.jsonl
    """
    from app.models import choose_device, load_network, open_corpus, open_source
    from app.scoring import Reader, describe, same_vocabulary, summarise

    for name, number in (("batch_tokens", batch_tokens), ("validation_rows", validation_rows)):
        if number is not None and number < 1:
            raise UserError(f"--{name}: {number} must be at least 1")
    if (input is None) == (data is None):
        raise UserError(
            "--input: give either rows as --input FILE --output FILE, or a prepared corpus as --data FOLDER"
        )
    if (input is None) != (output is None):
        raise UserError("--output: it goes with --input, and --input needs it; of --data figures are printed")
    if data is None and validation_rows is not None:
        raise UserError("--validation_rows: only --data has such rows; leave it out")
    where, rows = choose_device(device), {} if input is None else read_rows(input)
    source = open_source(model)
    other = None if reference is None else open_source(reference)
    if other is not None:
        same_vocabulary(source, other)

    def load() -> "list[Network]":
        return [load_network(folder, dtype, where) for folder in (source, other) if folder is not None]

    if input is None or output is None:
        assert data is not None
        print(_score_corpus(open_corpus(data, source), validation_rows, load, batch_tokens))
        return
    reader = Reader(source)
    tokens = [reader.tokens(row, place) for place, row in rows.items()]
    answers = open_answers(output, input, _settings(source, other, dtype))
    if answers.summary is not None:
        print(f"{output} is complete already; remove it to score again")
    else:
        if answers.count < len(rows):
            mark = {} if reader.fingerprint is None else {"tokenizer": reader.fingerprint}
            _answer([row | mark for row in rows.values()], tokens, answers, load(), batch_tokens)
        answers.finish(summarise(answers.read(), reader.token_bytes()))
    assert answers.summary is not None
    print(describe(answers.summary), file=for_people(output))


def _score_corpus(corpus: "Corpus", wanted: int | None, load: Callable[[], "list[Network]"], batch_tokens: int) -> str:
    """Return the figures of the held-out rows of a corpus, as `validate` defines them.

    Args:
        corpus: the corpus.
        wanted: rows to take, evenly spaced; None: all.
        load: gives the network, and the reference if there is one.
        batch_tokens: positions in a forward pass.
    """
    from app.scoring import Tokens, describe, summarise, token_bytes
    from datamodules.progress import ProgressBar
    from modules.generation import scoring

    reader = corpus.rows("validation")
    count = len(reader) if wanted is None else min(wanted, len(reader))
    if not count:
        raise UserError(f"--data: {corpus.path} has no held-out rows; prepare with a validation_fraction above 0")
    networks, at_once = load(), max(WINDOW_BATCHES * batch_tokens // corpus.sequence_length, 1)

    def answers() -> Iterator[dict[str, Any]]:
        with ProgressBar("scoring", count, unit="rows") as progress:
            for first in range(0, count, at_once):
                places = range(first, min(first + at_once, count))
                documents = [ids for place in places for ids in reader.documents(place * len(reader) // count)]
                for index, scores in scoring.score(networks[0], documents, *networks[1:], batch_tokens=batch_tokens):
                    yield answer(Tokens(documents[index], None), scores)
                progress.advance(len(places))

    summary = summarise(answers(), token_bytes(corpus.tokenizer)) | {"rows": count}
    if not summary["tokens"]:
        raise UserError(f"--data: the held-out rows of {corpus.path} have no token to predict; prepare more of them")
    gzip = corpus.metadata["gzip_bits_per_byte"] if count == len(reader) else None
    return describe(summary) + (f" (gzip -9: {gzip:.4f})" if gzip and summary["bits_per_byte"] else "")


def _answer(
    rows: list[dict[str, Any]], tokens: "list[Tokens]", answers: Answers, networks: "list[Network]", batch_tokens: int
) -> None:
    """Score the rows that have no answer yet, and write the answers.

    Args:
        rows: all rows.
        tokens: their tokens.
        answers: where to write.
        networks: the network, and the reference if there is one.
        batch_tokens: positions in a forward pass.
    """
    from datamodules.progress import ProgressBar
    from modules.generation import scoring

    lengths = [len(row.ids) for row in tokens]
    todo = [window for window in windows(lengths, WINDOW_BATCHES * batch_tokens) if window.stop > answers.count]
    with ProgressBar("scoring", sum(lengths), sum(lengths[: todo[0].start]), unit="tokens") as progress:
        for window in todo:
            ids = [tokens[index].ids for index in window]
            scored: dict[int, scoring.Scores] = {}
            for index, scores in scoring.score(networks[0], ids, *networks[1:], batch_tokens=batch_tokens):
                scored[window[index]] = scores
                progress.advance(len(ids[index]))
            answers.append(
                [
                    rows[index] | answer(tokens[index], scored[index])
                    for index in range(max(window.start, answers.count), window.stop)
                ]
            )


def windows(lengths: Sequence[int], tokens: int) -> list[range]:
    """Cut rows, in their order, into stretches of about `tokens`: what is scored together and then written.

    The stretches depend on all rows, not on how far a command has come: the batches of a command that goes on are those
    of one that was never stopped.
    """
    found, start, total = [], 0, 0
    for index, length in enumerate(lengths):
        total += max(length, 1)
        if total >= tokens or index == len(lengths) - 1:
            found.append(range(start, index + 1))
            start, total = index + 1, 0
    return found


def answer(tokens: "Tokens", scores: "Scores") -> dict[str, Any]:
    """Return the keys that scoring adds to a row; 9 digits hold an fp32 number exactly."""
    added: dict[str, Any] = {"token_ids": tokens.ids, "logprobs": _numbers(scores.logprobs)}
    if tokens.completion_start is not None:
        added["completion_start"] = tokens.completion_start
    if scores.kl is not None:
        added["kl"] = _numbers(scores.kl)
    return added


def _numbers(values: "Tensor") -> list[float]:
    return [float(f"{value:.9g}") for value in values.tolist()]


def _settings(source: "ModelFolder", reference: "ModelFolder | None", dtype: Dtype) -> dict[str, Any]:
    """Return what decides the scores, beside the input."""
    return {
        "command": "score",
        "model": str(source.path.resolve()),
        "reference": None if reference is None else str(reference.path.resolve()),
        "dtype": short_dtype(dtype),
    }
