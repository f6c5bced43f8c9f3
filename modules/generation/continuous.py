"""Rows that join and leave while others are being written: what a server decodes with.

A prompt goes through by itself, piece by piece, so that rows that are being written wait for a piece and not for a
prompt; its rows then join the batch, each with its own sampling, and a row that ends leaves it. Prefill and first token
are therefore the same bits whatever else is decoded. Later tokens come from passes over all rows, whose products add up
in an order that depends on how many there are: log-probabilities differ by rounding (some 1e-6 in fp32), and a token
only where two are closer than that. The random numbers of a row are its own.

Shapes: B rows, T positions, D hidden, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from modules.backbone.model import Network
from modules.generation.decoding import Row
from modules.generation.runner import Runner
from modules.generation.sampling import Sampling, distribution, draw
from modules.ops import native


class TokenScore(NamedTuple):
    """What the network says of a token (natural log, temperature 1, whole vocabulary)."""

    logprob: float
    """Its log-probability given the tokens before it."""
    likeliest: list[tuple[int, float]]
    """The most likely tokens in its place and their log-probabilities, the likeliest first."""


@dataclass
class BatchRow(Row):
    """A completion that is being written, with choices of its own."""

    sampling: Sampling = field(default_factory=Sampling)
    """How its tokens are chosen."""
    scored: int | None = None
    """How many of the most likely tokens are wanted beside each token's log-probability; None: no log-probabilities."""
    scores: list[TokenScore] = field(default_factory=list)
    """Of each of its tokens, if asked for."""


class Prefill:
    """A prompt on its way through the network.

    Args:
        network: the network.
        tokens: the prompt, at least one token.
        room: tokens that will follow at most.
        scored: see `BatchRow`, of the prompt's tokens.
    """

    def __init__(self, network: Network, tokens: list[int], room: int, scored: int | None = None) -> None:
        self._network, self._tokens, self._scored = network, tokens, scored
        self.runner = Runner(network, 1, len(tokens) + room)
        self.last: Tensor | None = None
        """[1, D]: hidden state that the next token follows from."""
        self.scores: list[TokenScore] = []
        """Of each token after the first, if asked for."""

    def advance(self, count: int) -> bool:
        """Take the next `count` tokens; return whether the prompt is through."""
        start = self.runner.cache.lengths[0]
        piece = self._tokens[start : start + count]
        device = self._network.backbone.embeddings.weight.device
        hidden = self.runner.run(torch.tensor([piece], device=device))[0]
        if self._scored is not None:
            split, following = self._network.split_for_logits, self._tokens[start + 1 : start + 1 + len(piece)]
            targets = torch.tensor(following, dtype=torch.int64, device=device)
            for part, states in zip(split(targets), split(hidden[: len(following)]), strict=True):
                self.scores += score_tokens(self._network.logits(states), part, [self._scored] * len(part))
        self.last = hidden[-1:].clone()  # not a view: pieces are let go
        return start + len(piece) == len(self._tokens)


class ContinuousBatch:
    """The rows that are being written.

    Args:
        network: the network.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.rows: list[BatchRow] = []
        self._runner = Runner(network, 0, 0)
        device = network.backbone.embeddings.weight.device
        self._chosen = torch.empty(0, dtype=torch.int64, device=device)  # [B] tokens the network has not seen yet

    def join(self, prefill: Prefill, rows: Sequence[BatchRow]) -> None:
        """Choose the first token of rows that share a prompt, and take in those that it does not end.

        Args:
            prefill: the prompt, which is through.
            rows: rows of at least one token; the room of `prefill` is enough for each.
        """
        assert prefill.last is not None, "the prompt is through"
        chosen = self._choose(prefill.last.expand(len(rows), -1), rows)
        places = [place for place, row in enumerate(rows) if row.finish is None]
        if places:
            prefill.runner.cache.select([0] * len(places))
            self._runner.cache.join(prefill.runner.cache)
            self._chosen = torch.cat([self._chosen, chosen[places]])
            self.rows += [rows[place] for place in places]

    def step(self) -> None:
        """Choose the next token of each row; rows that have ended are still among `rows` until `leave`."""
        hidden = self._runner.run(self._chosen[:, None])[:, -1]
        self._chosen = self._choose(hidden, self.rows)

    def leave(self) -> None:
        """Let go of the rows that have ended: `finish` says so."""
        places = [place for place, row in enumerate(self.rows) if row.finish is None]
        if len(places) < len(self.rows):
            self.rows = [self.rows[place] for place in places]
            self._runner.cache.select(places)
            self._chosen = self._chosen[places]

    def _choose(self, hidden: Tensor, rows: Sequence[BatchRow]) -> Tensor:
        """Return int64 [B]: what follows hidden states [B, D], and add it to the rows."""
        logits = self.network.logits(hidden)
        chosen = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        alike: dict[Sampling, list[int]] = {}
        for place, row in enumerate(rows):
            alike.setdefault(dataclasses.replace(row.sampling, seed=0), []).append(place)
        for sampling, places in alike.items():
            part = logits if len(alike) == 1 else logits[places]
            if sampling.greedy:
                chosen[places] = native.largest(part)
            else:
                chosen[places] = draw(distribution(part, sampling), [rows[place].random.random() for place in places])
        asked = [place for place, row in enumerate(rows) if row.scored is not None]
        if asked:
            counts = [rows[place].scored or 0 for place in asked]
            for place, score in zip(asked, score_tokens(logits[asked], chosen[asked], counts), strict=True):
                rows[place].scores.append(score)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            row.extend([token], [])
        return chosen


def score_tokens(logits: Tensor, tokens: Tensor, counts: Sequence[int]) -> list[TokenScore]:
    """Return what logits say of tokens.

    Args:
        logits: fp32 [n, V].
        tokens: int64 [n].
        counts: how many of the most likely tokens are wanted of each, 0 to V.
    """
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
    values, ids = (part.tolist() for part in logprobs.topk(min(max(counts, default=0), logits.shape[1])))
    return [
        TokenScore(logprob, list(zip(places, numbers, strict=True))[:count])
        for logprob, places, numbers, count in zip(own, ids, values, counts, strict=True)
    ]
