"""From a prompt to the next token, one token a step: the plain decoder, and what any decoder can do.

A step of a small network costs well under a millisecond, so the loop around it must cost microseconds: a greedy step is
one argmax over all rows and one transfer to the host, probabilities and log-probabilities are computed only if asked
for, and the chosen tokens go back into the network as the tensor they are.

Shapes: B rows, T positions, D hidden, V vocabulary.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from modules.backbone.model import Network
from modules.generation.runner import Runner
from modules.generation.sampling import Sampling, distribution, draw
from modules.generation.stopping import TextStream
from modules.ops import native


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How a decoder runs the network."""

    sampling: Sampling
    """How tokens are chosen."""
    draft_tokens: int = 0
    """Tokens that the MTP block drafts for each verification; 0: plain decoding."""
    state_dtype: torch.dtype = torch.float32
    """Dtype of the SSM states between steps; fp16 is rounded stochastically."""
    logprobs: bool = False
    """Whether the log-probability of each chosen token is wanted."""
    prefill_tokens: int = 4096
    """Positions of all rows together that one forward pass of the prompts takes: bounds the memory of long prompts."""
    agree: Callable[[Tensor], Any] | None = None
    """Overwrites the chosen tokens int64 [B] with those of one process, where several run a sharded network: all must
    take the same number of steps."""


@dataclass
class Row:
    """A completion that is being written."""

    limit: int
    """Tokens to write at most, >= 1."""
    eos_ids: frozenset[int]
    """Tokens that end it."""
    random: random.Random
    """The row's own random numbers."""
    text: TextStream | None = None
    """Its text, where somebody needs to know it before the end."""
    tokens: list[int] = field(default_factory=list)
    """What is written, the token that ended it included."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each token by the network (natural log, temperature 1), if asked for."""
    accepted: list[int] = field(default_factory=list)
    """How many drafted tokens each verification accepted."""
    finish: Literal["eos", "stop", "length"] | None = None
    """Why it ended; None: it goes on."""

    def extend(self, tokens: list[int], logprobs: list[float]) -> None:
        """Take the tokens of a step, up to the one that ends the row."""
        for count, token in enumerate(tokens, 1):
            self.tokens.append(token)
            if token in self.eos_ids:
                self.finish = "eos"
            elif self.text is not None and self.text.add([token]):
                self.finish = "stop"
            elif len(self.tokens) == self.limit:
                self.finish = "length"
            if self.finish is not None:
                self.logprobs += logprobs[:count]
                return
        self.logprobs += logprobs


class Step(NamedTuple):
    """What a step adds."""

    tokens: list[list[int]]
    """New tokens of each row, at least one."""
    logprobs: list[list[float]]
    """Their log-probabilities; empty lists if not asked for."""


class Decoder(Protocol):
    """A batch of rows in the network's cache."""

    def prefill(self, prompts: list[list[int]]) -> None:
        """Let the rows go on by a prompt each, at least one token."""

    def select(self, rows: list[int]) -> None:
        """Keep these rows in this order; a row may come several times."""

    def step(self, rows: list[Row]) -> Step:
        """Choose the next tokens of each row."""
        ...


class PlainDecoder:
    """One forward pass, one token.

    Args:
        network: the network.
        rows: rows B of the first `prefill`.
        capacity: tokens of a row at most, prompt and completion.
        decoding: how to run it.
    """

    def __init__(self, network: Network, rows: int, capacity: int, decoding: Decoding) -> None:
        self.network = network
        self.decoding = decoding
        self.device = network.backbone.embeddings.weight.device
        self.generator = None
        if decoding.state_dtype != torch.float32:
            self.generator = torch.Generator(self.device).manual_seed(decoding.sampling.seed)
        self.runner = Runner(network, rows, capacity, decoding.state_dtype, self.generator)
        self.cache = self.runner.cache
        self._last: Tensor | None = None  # [B, D] hidden states that the next token follows from
        self._chosen: Tensor | None = None  # int64 [B] tokens that the network has not seen yet

    def prefill(self, prompts: list[list[int]]) -> None:
        """Let the rows go on by a prompt each, in chunks; shorter ones wait for the longest."""
        ends: list[Tensor | None] = [None] * len(prompts)
        chunk = max(1, self.decoding.prefill_tokens // len(prompts))
        for start in range(0, max(map(len, prompts)), chunk):
            parts = [prompt[start : start + chunk] for prompt in prompts]
            counts = [len(part) for part in parts]
            width = max(counts)
            tokens = torch.tensor([part + [0] * (width - len(part)) for part in parts], device=self.device)
            hidden = self.runner.run(tokens, counts=counts)
            self._passed(tokens, hidden, counts)
            for row, prompt in enumerate(prompts):
                if start < len(prompt) <= start + chunk:
                    ends[row] = hidden[row, len(prompt) - start - 1].clone()  # not a view: chunks are let go
        assert all(end is not None for end in ends), "an empty prompt"
        self._last, self._chosen = torch.stack(ends), None  # type: ignore[arg-type]

    def select(self, rows: list[int]) -> None:
        """Keep these rows in this order; a row may come several times."""
        self.cache.select(rows)
        index = torch.tensor(rows, device=self.device)
        if self._chosen is not None:
            self._chosen = self._chosen[index]
        elif self._last is not None:
            self._last = self._last[index]

    def step(self, rows: list[Row]) -> Step:
        """Choose the next token of each row."""
        if self._chosen is not None:
            self._last = self.runner.run(self._chosen[:, None])[:, -1]
        assert self._last is not None, "prompts come first"
        logits = self.network.logits(self._last)
        self._chosen = chosen = self._choose(logits, rows)
        logprobs: list[list[float]] = [[] for _ in rows]
        if self.decoding.logprobs:
            logprobs = logits.log_softmax(-1).gather(1, chosen[:, None]).tolist()
        return Step([[token] for token in chosen.tolist()], logprobs)

    def _choose(self, logits: Tensor, rows: list[Row]) -> Tensor:
        sampling = self.decoding.sampling
        if sampling.greedy:
            chosen = native.largest(logits)
        else:
            chosen = draw(distribution(logits, sampling), [row.random.random() for row in rows])
        self._agree(chosen)
        return chosen

    def _agree(self, chosen: Tensor) -> None:
        if self.decoding.agree is not None:
            self.decoding.agree(chosen)

    def _passed(self, tokens: Tensor, hidden: Tensor, counts: list[int]) -> None:
        """See a chunk of the prompts, int64 [B, T], and its hidden states [B, T, D]: for decoders that keep more."""
