"""Completions of many prompts: batches of similar length, rows that leave when they end, results in order.

The batches are planned from the lengths of all prompts before the first token, so the same requests give the same
batches, and with them the same bits, whether a run is done in one go or resumed (`first`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from modules.backbone.model import Network
from modules.errors import UserError
from modules.generation.decoding import Decoder, Decoding, PlainDecoder, Row
from modules.generation.sampling import Sampling
from modules.generation.speculative import SpeculativeDecoder
from modules.generation.stopping import Decode, TextStream

WINDOW = 8
"""Batches whose prompts are sorted by length together: large enough to waste little, small enough that results, which
come in order, do not wait long."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to complete."""

    tokens: list[int]
    """Token ids of the prompt, at least one. Requests with the same prompt that meet in a batch share its prefill."""
    max_new_tokens: int
    """Tokens to add at most, >= 0."""
    key: tuple[int, ...] = ()
    """Names the random numbers of this completion, together with the seed: for example (prompt, sample)."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What follows a prompt."""

    tokens: list[int]
    """The new tokens; an end-of-text token or those of a stop string included."""
    text: str | None
    """Their text without end-of-text token and stop string; None without a decode function."""
    logprobs: list[float]
    """Log-probability of each token by the network (natural log, temperature 1, whole vocabulary), if asked for."""
    finish: Literal["eos", "stop", "length"]
    """Why it ends: an end-of-text token, a stop string, or max_new_tokens."""
    accepted: list[int]
    """How many drafted tokens each verification accepted; empty in plain decoding."""


@torch.no_grad()
def generate(
    network: Network,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    eos_ids: Sequence[int] = (),
    decode: Decode | None = None,
    stop: Sequence[str] = (),
    batch_size: int = 16,
    first: int = 0,
    draft_tokens: int = 0,
    state_dtype: torch.dtype = torch.float32,
    logprobs: bool = False,
    prefill_tokens: int = 4096,
    on_text: Callable[[int, str], Any] | None = None,
    agree: Callable[[Tensor], Any] | None = None,
) -> Iterator[Completion]:
    """Complete prompts.

    Args:
        network: the network; its mode (training or not) is left as it is.
        requests: the prompts.
        sampling: how tokens are chosen.
        eos_ids: tokens that end a completion.
        decode: the tokenizer's decoder; needed for texts.
        stop: strings that end a completion; looked for in the text of the new tokens, across their borders.
        batch_size: completions that are written together.
        first: number of the first request whose completion is wanted; the batches stay those of the whole list.
        draft_tokens: see `Decoding`.
        state_dtype: see `Decoding`.
        logprobs: whether log-probabilities are wanted.
        prefill_tokens: see `Decoding`.
        on_text: called with a request's number and text that has been added to its completion and is certain.
        agree: see `Decoding`.

    Returns:
        An iterator over the completions of `requests[first:]`, in order.

    Raises:
        UserError: if a prompt is empty or holds a token that the network does not know, or an option is out of range.
    """
    _check(network, requests, batch_size, stop, decode)
    decoding = Decoding(
        sampling=sampling,
        draft_tokens=draft_tokens,
        state_dtype=state_dtype,
        logprobs=logprobs,
        prefill_tokens=prefill_tokens,
        agree=agree,
    )
    done: dict[int, Completion] = {}
    wanted = first
    for batch in plan_batches([len(request.tokens) for request in requests], batch_size):
        if max(batch) < first:
            continue
        rows = {
            number: new_row(
                requests[number], sampling, eos_ids=eos_ids, decode=decode, stop=stop, streams=on_text is not None
            )
            for number in batch
        }
        _write(network, [requests[number] for number in batch], rows, decoding, on_text)
        for number, row in rows.items():
            done[number] = finish(row, requests[number], decode)
        while wanted in done:
            yield done.pop(wanted)
            wanted += 1


def plan_batches(lengths: list[int], batch_size: int, window: int = WINDOW) -> list[list[int]]:
    """Return the request numbers of each batch.

    Requests are sorted by length within windows of some batches; the batches of a window come in the order of their
    smallest number, so that results can leave in order early.
    """
    batches: list[list[int]] = []
    for start in range(0, len(lengths), batch_size * window):
        numbers = range(start, min(start + batch_size * window, len(lengths)))
        ordered = sorted(numbers, key=lambda number: lengths[number])
        cut = [ordered[first : first + batch_size] for first in range(0, len(ordered), batch_size)]
        batches += sorted(cut, key=min)
    return batches


def new_row(
    request: Request,
    sampling: Sampling,
    *,
    eos_ids: Sequence[int],
    decode: Decode | None,
    stop: Sequence[str],
    streams: bool,
) -> Row:
    """Return the empty completion of a request; its text is followed only if it stops or streams."""
    follow = decode is not None and (stop or streams)
    return Row(
        limit=request.max_new_tokens,
        eos_ids=frozenset(eos_ids),
        random=sampling.stream(request.key),
        text=TextStream(decode, request.tokens, stop) if follow else None,  # type: ignore[arg-type]
        finish=None if request.max_new_tokens else "length",
    )


def new_decoder(network: Network, rows: int, capacity: int, decoding: Decoding) -> Decoder:
    """Return a decoder for a batch of rows."""
    kind = SpeculativeDecoder if decoding.draft_tokens else PlainDecoder
    return kind(network, rows, capacity, decoding)


def write(decoder: Decoder, rows: dict[int, Row], on_text: Callable[[int, str], Any] | None = None) -> None:
    """Step until all rows have ended; a row that ends leaves the decoder.

    Args:
        decoder: holds the prompts of the rows, in their order.
        rows: the rows by request number.
        on_text: see `generate`.
    """
    active = list(rows.items())
    while active:
        present = [row for _, row in active]
        step = decoder.step(present)
        for row, tokens, logprobs in zip(present, step.tokens, step.logprobs, strict=True):
            row.extend(tokens, logprobs)
        if on_text is not None:
            for number, row in active:
                _send(number, row, on_text)
        keep = [place for place, row in enumerate(present) if row.finish is None]
        if len(keep) < len(active):
            active = [active[place] for place in keep]
            if active:
                decoder.select(keep)


def finish(row: Row, request: Request, decode: Decode | None) -> Completion:
    """Return the completion that a finished row holds."""
    assert row.finish is not None
    text = row.text
    if text is None and decode is not None:
        text = TextStream(decode, request.tokens)
        if words := row.tokens[: -1 if row.finish == "eos" else None]:
            text.add(words)
    if text is not None:
        text.finish()
    return Completion(
        tokens=row.tokens,
        text=None if text is None else text.text,
        logprobs=row.logprobs,
        finish=row.finish,
        accepted=row.accepted,
    )


def _write(
    network: Network,
    requests: list[Request],
    rows: dict[int, Row],
    decoding: Decoding,
    on_text: Callable[[int, str], Any] | None,
) -> None:
    """Write the rows of a batch: each different prompt is prefilled once."""
    active = [
        (number, request) for (number, row), request in zip(rows.items(), requests, strict=True) if row.finish is None
    ]
    if not active:
        return
    places: dict[tuple[int, ...], int] = {}
    order = [places.setdefault(tuple(request.tokens), len(places)) for _, request in active]
    capacity = max(len(request.tokens) + request.max_new_tokens for _, request in active)
    decoder = new_decoder(network, len(places), capacity, decoding)
    decoder.prefill([list(prompt) for prompt in places])
    if order != list(range(len(places))):
        decoder.select(order)
    write(decoder, {number: rows[number] for number, _ in active}, on_text)


def _send(number: int, row: Row, on_text: Callable[[int, str], Any]) -> None:
    assert row.text is not None
    piece = row.text.take()
    if row.finish is not None:
        piece += row.text.finish()
    if piece:
        on_text(number, piece)


def _check(
    network: Network, requests: Sequence[Request], batch_size: int, stop: Sequence[str], decode: Decode | None
) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size: {batch_size} must be at least 1")
    if not all(stop):
        raise UserError("stop: a stop string is empty; leave it out")
    if stop and decode is None:
        raise UserError("stop: stop strings need the text of tokens; this model brings no tokenizer")
    vocab_size = network.config.vocab_size
    for request in requests:
        if not request.tokens:
            raise UserError("prompt: must hold at least one token")
        if not 0 <= min(request.tokens) <= max(request.tokens) < vocab_size:
            raise UserError(f"prompt: holds a token id outside 0 to {vocab_size - 1}, the model's vocabulary")
        if request.max_new_tokens < 0:
            raise UserError(f"max_new_tokens: {request.max_new_tokens} must not be negative")
