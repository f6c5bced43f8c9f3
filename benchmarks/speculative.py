"""Speculative decoding against plain decoding, one prompt at a time: second part of benchmarks/generation.py.

The model that `fit` trained continues the beginnings of held-out files, greedily and at temperature 1, with each draft
length in turn. A small model soon repeats itself, and what repeats is easy to draft: a greedy continuation is cut where
a cycle begins its second turn (at most `PERIOD` tokens that come at least three times in a row and fill `SPAN`
tokens), and left out where fewer than `LEAST` tokens are left; sampled ones with a cycle are left out.

Predicted is what acceptance and costs give (`modules.generation.acceptance`), with the chance that a draft is kept once
those before it are taken at the largest draft length; the length predicted best is chosen, 0 if none gains. Measured
are whole completions; "decode" is without the prompt, for which the MTP block has to run too. Costs are medians over
the rounds of a completion, taken inside the decoder.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from app.__main__ import settle_process
from benchmarks.side import Side, timed
from modules.backbone.model import Network
from modules.checkpoints.load import load_model
from modules.generation.acceptance import Acceptance, Costs, best_draft_tokens, predicted_gain
from modules.generation.decoding import Decoding, PlainDecoder
from modules.generation.engine import Completion, Request, generate, new_row
from modules.generation.sampling import Sampling
from modules.generation.speculative import SpeculativeDecoder

DRAFTS = (0, 1, 2, 3, 4, 5)
"""Draft lengths; 0 is plain decoding."""
PERIOD, SPAN, LEAST = 32, 16, 16
"""Longest cycle looked for, tokens that its repetitions fill, tokens of a continuation that counts."""
ASKED = 1.15
"""Measured ratio asked for."""


Seconds = tuple[float, float]
"""CPU and wall seconds."""


@dataclass(frozen=True)
class Turn:
    """A completion to write; what a side is asked for."""

    prompt: int
    """Number of the prompt."""
    tokens: int
    drafts: int
    temperature: float
    seed: int
    costs: bool = False
    """Whether the costs inside are wanted, not the whole."""


class Written(NamedTuple):
    """A completion."""

    whole: Seconds
    """What it took."""
    prompt: Seconds
    """What the prompt and the first token alone take."""
    tokens: list[int]
    accepted: list[int]
    """Drafts kept in each round, the last one left out: it may run past the end."""


class Round(NamedTuple):
    """Median wall seconds of a round; one of plain decoding is a step."""

    drafts: float
    verification: float
    """All but the drafts."""


def serve(connection: Connection, model: Path, prompts: list[list[int]], threads: int) -> None:
    """Write completions on request: the main function of the process."""
    settle_process()
    torch.set_num_threads(threads)
    network = load_model(model).network
    connection.send(network.mtp is not None)
    while (turn := connection.recv()) is not None:
        connection.send(costs(network, prompts, turn) if turn.costs else write(network, prompts, turn))


@torch.inference_mode()
def write(network: Network, prompts: list[list[int]], turn: Turn) -> Written:
    """Write a completion."""
    sampling = Sampling(temperature=turn.temperature, seed=turn.seed)
    completions: list[Completion] = []

    def run(tokens: int) -> None:
        request = Request(tokens=prompts[turn.prompt], max_new_tokens=tokens, key=(turn.prompt,))
        completions.extend(generate(network, [request], sampling, draft_tokens=turn.drafts))

    whole, prompt = timed(lambda: run(turn.tokens)), timed(lambda: run(1))
    return Written(whole, prompt, completions[0].tokens, completions[0].accepted[:-1])


@torch.inference_mode()
def costs(network: Network, prompts: list[list[int]], turn: Turn) -> Round:
    """Return what a round of a completion costs."""
    prompt, sampling = prompts[turn.prompt], Sampling(temperature=turn.temperature, seed=turn.seed)
    decoding = Decoding(sampling=sampling, draft_tokens=turn.drafts)
    capacity = len(prompt) + turn.tokens + turn.drafts
    decoder = (SpeculativeDecoder if turn.drafts else PlainDecoder)(network, 1, capacity, decoding)
    drafting = [0.0]
    if isinstance(decoder, SpeculativeDecoder):
        # In C code or in Python: the one that is not used is not called.
        drafters = [(decoder, "_draft"), *([(decoder._native, "draft")] if decoder._native else [])]
        for owner, name in drafters:
            setattr(owner, name, _timing(getattr(owner, name), drafting))
    request = Request(tokens=prompt, max_new_tokens=turn.tokens)
    row = new_row(request, sampling, eos_ids=(), decode=None, stop=(), streams=False)
    decoder.prefill([prompt])
    rounds = []
    while row.finish is None:
        steps = []
        _, wall = timed(lambda: steps.append(decoder.step([row])))  # noqa: B023 (called at once)
        rounds.append((drafting[-1], wall - drafting[-1]))
        row.extend(steps[0].tokens[0], [])
    drafts, rest = zip(*rounds[1:], strict=True)  # the first token comes with the prompt
    return Round(statistics.median(drafts), statistics.median(rest))


def _timing(function: Callable[..., object], seconds: list[float]) -> Callable[..., object]:
    """Return `function` that adds the seconds of each call to a list."""

    def call(*arguments: object) -> object:
        result: list[object] = []
        seconds.append(timed(lambda: result.append(function(*arguments)))[1])
        return result[0]

    return call


def loop_start(tokens: list[int]) -> int | None:
    """Return the place where a cycle begins its second turn; None: nothing repeats itself."""
    starts = []
    for period in range(1, PERIOD + 1):
        run = 0
        for place in range(period, len(tokens)):
            run = run + 1 if tokens[place] == tokens[place - period] else 0
            if run >= max(2 * period, SPAN):
                starts.append(place - run + 1)
                break
    return min(starts, default=None)


def compare(model: Path, prompts: list[list[int]], new_tokens: int, threads: int, rounds: int) -> None:
    """Print the tables of one number of threads.

    Raises:
        SystemExit: the model has no MTP block.
    """
    side = Side("ours", serve, model, prompts, threads)
    if not side.ready:
        raise SystemExit(f"--model: {model} has no MTP block to draft with; take --parts model random")
    for temperature in (0.0, 1.0):
        how = f"temperature {temperature:g}" if temperature else "greedy"
        print(
            f"\nspeculative decoding, {model}, {how}, {threads} thread(s), batch 1, "
            f"{len(prompts)} held-out prompts of {len(prompts[0])} tokens, {rounds} rounds"
        )
        _compare_at(side, temperature, len(prompts), new_tokens, rounds)
    side.close()


def _compare_at(side: Side, temperature: float, prompts: int, new_tokens: int, rounds: int) -> None:
    lengths = dict.fromkeys(range(prompts), new_tokens)
    if not temperature:
        lengths = _cut(side, lengths)
    written = [_write_all(side, lengths, temperature, seed) for seed in range(rounds)]
    if temperature:
        count = sum(map(len, written))
        print(f"{count} continuations of {new_tokens} tokens count, {len(lengths) * rounds - count} repeat themselves")
    inside = [_ask_all(side, prompt, length, temperature, 0, costs=True) for prompt, length in lengths.items()]
    plain = statistics.median(costs[0].verification for costs in inside)
    longest = [kept for row in written for one in row for kept in one[DRAFTS[-1]].accepted]
    rates = Acceptance.of(longest, DRAFTS[-1]).rates
    shares = {
        drafts: statistics.median(sum(costs[drafts]) / costs[0].verification for costs in inside)
        for drafts in DRAFTS[1:]
    }
    parts = Costs(plain=1.0, rounds=shares)
    print(f"a plain step: {plain * 1e3:.3f} ms")
    print(
        f"{'drafts':>6}{'kept':>8}{'tokens/round':>14}{'drafts ms':>11}{'verify ms':>11}{'predicted':>11}"
        f"{'decode':>9}{'whole':>9}{'by CPU':>9}{'same text':>11}"
    )
    measured = {0: 1.0}
    for drafts in DRAFTS[1:]:
        measured[drafts] = _ratio(written, drafts, 1)
        tokens = Acceptance.of([kept for row in written for one in row for kept in one[drafts].accepted], drafts).length
        same = statistics.mean(one[drafts].tokens == one[0].tokens for row in written for one in row)
        draft, verification = (statistics.median(costs[drafts][part] for costs in inside) * 1e3 for part in range(2))
        decode, by_cpu = _ratio(written, drafts, 1, prompt=False), _ratio(written, drafts, 0)
        print(
            f"{drafts:6}{rates[drafts - 1]:8.1%}{tokens:14.2f}{draft:11.3f}{verification:11.3f}"
            f"{predicted_gain(parts, rates, drafts):10.2f}x{decode:8.2f}x{measured[drafts]:8.2f}x{by_cpu:8.2f}x"
            f"{'-' if temperature else f'{same:.1%}':>11}",
            flush=True,
        )
    best = best_draft_tokens(parts, rates)
    verdict = "reached" if measured[best] >= ASKED else "missed"
    print(f"chosen draft length: {best}; asked: {ASKED}x; whole completions {measured[best]:.2f}x: {verdict}")


def _ask_all(
    side: Side, prompt: int, length: int, temperature: float, seed: int, costs: bool = False
) -> dict[int, Any]:
    """Return the answers to a turn at each draft length."""
    return {drafts: side.ask(Turn(prompt, length, drafts, temperature, seed, costs)) for drafts in DRAFTS}


def _write_all(side: Side, lengths: dict[int, int], temperature: float, seed: int) -> list[dict[int, Written]]:
    """Return the completions of each prompt at each draft length, without sampled ones of which one repeats itself."""
    found = [_ask_all(side, prompt, length, temperature, seed) for prompt, length in lengths.items()]
    if not temperature:
        return found  # they are cut
    return [one for one in found if all(loop_start(written.tokens) is None for written in one.values())]


def _ratio(rounds: list[list[dict[int, Written]]], drafts: int, column: int, prompt: bool = True) -> float:
    """Return the median over rounds of the seconds of plain decoding by those with drafts, with or without prompts."""

    def seconds(row: list[dict[int, Written]], length: int) -> float:
        return sum(one[length].whole[column] - (not prompt) * one[length].prompt[column] for one in row)

    return statistics.median(seconds(row, 0) / seconds(row, drafts) for row in rounds if row)


def _cut(side: Side, lengths: dict[int, int]) -> dict[int, int]:
    """Return the tokens of each greedy continuation before it repeats itself, of those with enough of them.

    Raises:
        SystemExit: none has.
    """
    starts = {
        prompt: loop_start(side.ask(Turn(prompt, length, 0, 0.0, 0)).tokens) for prompt, length in lengths.items()
    }
    cut = {prompt: length if starts[prompt] is None else starts[prompt] or 0 for prompt, length in lengths.items()}
    counted = {prompt: length for prompt, length in cut.items() if length >= LEAST}
    repeating = sum(start is not None for start in starts.values())
    print(
        f"{len(counted)} continuations count, {sum(counted.values()):,} tokens; {repeating} repeat themselves and are "
        f"cut there, {len(cut) - len(counted)} of them left out"
    )
    if not counted:
        raise SystemExit(f"every continuation repeats itself within {LEAST} tokens; take a model trained for longer")
    return counted
