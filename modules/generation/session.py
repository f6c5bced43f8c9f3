"""A conversation in the cache: each turn computes only what is new.

An SSM state cannot be cut back to an earlier position as keys and values can. So besides where it stands, a session
keeps one snapshot, taken where the conversation will change once it goes on (a template that drops the thoughts of
earlier turns, or moves a note to the newest one), so that only what follows is computed again.
"""

from collections.abc import Iterator, Sequence
from itertools import count

import torch

from modules.backbone.cache import Snapshot
from modules.backbone.model import Network
from modules.generation.decoding import Decoding, PlainDecoder, Row
from modules.generation.sampling import Sampling
from modules.generation.stopping import Decode, TextStream

LEAST_CAPACITY = 4096
"""Tokens of the first cache at least."""


class Session:
    """One row of a network's cache, used again and again.

    Args:
        network: the network.
        sampling: how tokens are chosen; each reply has random numbers of its own.
        eos_ids: tokens that end a reply.
        decode: the tokenizer's decoder.
        state_dtype: dtype of the SSM states between steps, see `Decoding`.
    """

    def __init__(
        self,
        network: Network,
        sampling: Sampling,
        eos_ids: Sequence[int],
        decode: Decode,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        self._network, self._decode = network, decode
        self._eos_ids = frozenset(eos_ids)
        self._decoding = Decoding(sampling=sampling, state_dtype=state_dtype)
        self._decoder: PlainDecoder | None = None
        self._seen: list[int] = []  # tokens in the cache
        self._snapshot: tuple[list[int], Snapshot] = [], Snapshot([], [])
        self._turns = count()
        self.tokens: list[int] = []
        """The newest conversation with its reply, as far as it came, without the token that ended it."""
        self.text = ""
        """The newest reply."""
        self.computed = 0
        """Tokens of the newest conversation that were not in the cache."""

    @torch.no_grad()
    def reply(self, tokens: list[int], max_new_tokens: int, lasting: int | None = None) -> Iterator[str]:
        """Yield a reply in pieces; whoever stops asking for pieces ends it.

        Args:
            tokens: the whole conversation, longer than what the one before began with.
            max_new_tokens: tokens of the reply at most, >= 1.
            lasting: how many of the tokens, >= 1, the conversation will begin with when it goes on; None: all.
        """
        self.tokens, self.text = list(tokens), ""
        decoder = self._continue(tokens, len(tokens) + max_new_tokens, len(tokens) if lasting is None else lasting)
        stream = TextStream(self._decode, tokens)
        random = self._decoding.sampling.stream((next(self._turns),))
        row = Row(limit=max_new_tokens, eos_ids=self._eos_ids, random=random, text=stream)
        while row.finish is None:
            step = decoder.step([row])
            row.extend(step.tokens[0], step.logprobs[0])
            ended = row.finish == "eos"
            self.tokens = tokens + (row.tokens[:-1] if ended else row.tokens)
            self._seen = tokens + row.tokens[: decoder.cache.lengths[0] - len(tokens)]
            piece = stream.take() + (stream.finish() if row.finish else "")
            self.text = stream.text
            yield piece

    def _continue(self, tokens: list[int], capacity: int, lasting: int) -> PlainDecoder:
        """Bring the cache to the end of `tokens`, from the farthest point that it can start from.

        The snapshot is taken on the way, behind the `lasting` first ones; what begins behind it keeps an earlier one.
        """
        decoder = self._decoder
        start = 0
        if decoder is not None and capacity <= decoder.cache.capacity:
            before, snapshot = self._snapshot
            if _begins(tokens, self._seen):
                start = len(self._seen)
            elif _begins(tokens, before):
                start = len(before)
                decoder.cache.restore(snapshot)
        if decoder is None or start == 0:
            capacity = max(2 * capacity, LEAST_CAPACITY)
            decoder = self._decoder = PlainDecoder(self._network, 1, capacity, self._decoding)
        self.computed = len(tokens) - start
        if start < lasting:
            decoder.prefill([tokens[start:lasting]])
            start = lasting
        if start == lasting:
            self._snapshot = tokens[:lasting], decoder.cache.snapshot()
        if start < len(tokens):
            decoder.prefill([tokens[start:]])
        self._seen = list(tokens)
        return decoder


def _begins(tokens: list[int], beginning: list[int]) -> bool:
    return len(beginning) < len(tokens) and tokens[: len(beginning)] == beginning
