"""A network with the interface of the cached forward pass that computes everything anew."""

from typing import NamedTuple

import torch

from modules.backbone.model import Network


class Hidden(NamedTuple):
    hidden: torch.Tensor


class StandinCache:
    def __init__(self, rows: int) -> None:
        self.seen: list[list[int]] = [[] for _ in range(rows)]

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.seen]

    def select(self, rows: list[int]) -> None:
        self.seen = [list(self.seen[row]) for row in rows]


class StandinNetwork:
    def __init__(self, network: Network) -> None:
        self.inner = network
        self.config, self.backbone, self.logits = network.config, network.backbone, network.logits

    def new_cache(self, rows, capacity, state_dtype=torch.float32, generator=None) -> StandinCache:
        return StandinCache(rows)

    def __call__(self, tokens, cache, counts=None) -> Hidden:
        counts = counts or [tokens.shape[1]] * len(tokens)
        hidden = torch.zeros(*tokens.shape, self.config.hidden_size)
        for row, count in enumerate(counts):
            cache.seen[row] += tokens[row, :count].tolist()
            if count:
                hidden[row, :count] = self.inner(torch.tensor([cache.seen[row]])).hidden[0, -count:]
        return Hidden(hidden)
