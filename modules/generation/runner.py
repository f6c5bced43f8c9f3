"""Forward passes over a cache: in C (`native`) where that applies, else the network's own, the same but for rounding.

C takes a few positions at a time, of rows that all go on by as many.
Shapes: B rows, T new positions, D hidden.
"""

import torch
from torch import Tensor

from modules.backbone.cache import Cache
from modules.backbone.model import Network
from modules.generation.native import NativeLayers


class Runner:
    """Runs a network, or its MTP block, over a new cache; for the arguments see `Network.new_cache`."""

    def __init__(
        self,
        network: Network,
        rows: int,
        capacity: int,
        state_dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
        mtp: bool = False,
    ) -> None:
        self.network = network
        self.cache = network.new_cache(rows, capacity, state_dtype, generator, mtp)
        self.native = NativeLayers.describe(network, self.cache, state_dtype, mtp)
        """The C code; None: it is not for this network."""
        self._newest: NativeLayers | Cache = self.cache  # who ran the newest pass

    def run(
        self,
        tokens: Tensor,
        hidden: Tensor | None = None,
        counts: list[int] | None = None,
        hold: bool = False,
        whole: bool = True,
    ) -> Tensor:
        """Return normalised hidden states [B, T, D]; for the arguments see `Network.forward`, or `Network.draft`."""
        native, even = self.native, counts is None or min(counts) == tokens.shape[1]
        if native is not None and even and native.takes(*tokens.shape):
            self._newest = native
            return native.run(tokens, hidden, hold, whole)
        self._newest = self.cache
        if hidden is None:
            return self.network(tokens, cache=self.cache, counts=counts, hold=hold).hidden
        return self.network.draft(tokens, hidden, self.cache, counts, hold, whole)

    def advance(self, counts: list[int]) -> None:
        """Take over the first `counts` [B] tokens that the pass before held, and forget the rest."""
        self._newest.advance(counts)
