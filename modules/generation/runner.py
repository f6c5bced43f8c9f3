"""Forward passes over a cache: in C (`native`) where that applies, else the network's own, the same but for rounding.

C takes a few positions at a time, of rows that all go on by as many.
Shapes: B rows, T new positions, D hidden.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from modules.backbone.cache import Cache
from modules.backbone.layer import Layer
from modules.backbone.model import Network
from modules.generation.native import NativeLayers


class _CachedLayers:
    """A cache, the C code for the layers that it belongs to, and who ran the newest pass."""

    def __init__(
        self,
        network: Network,
        cache: Cache,
        state_dtype: torch.dtype,
        layers: nn.ModuleList,
        final: nn.Module,
        join: Sequence[nn.Module] = (),
    ) -> None:
        self.network, self.cache = network, cache
        described = cast(list[Layer], list(layers))
        fits = NativeLayers.fits([*described, network.backbone.embeddings, final], state_dtype)
        self.native = NativeLayers(network, cache, described, final, join) if fits else None
        """The C code; None: it is not for this network."""
        self._newest: NativeLayers | Cache = cache  # what the newest pass ran on

    def _native_for(self, tokens: Tensor, counts: list[int] | None) -> NativeLayers | None:
        """Return the C code if it can run a pass of int64 [B, T] tokens, of which `counts` [B] are real."""
        whole = counts is None or min(counts) == tokens.shape[1]
        native = self.native if whole and self.native is not None and self.native.takes(*tokens.shape) else None
        self._newest = native or self.cache
        return native

    def advance(self, counts: list[int]) -> None:
        """Take over the first `counts` [B] tokens that the pass before held, and forget the rest."""
        self._newest.advance(counts)


class Runner(_CachedLayers):
    """Runs a network over a new cache; for the arguments see `Network.new_cache`."""

    def __init__(
        self,
        network: Network,
        rows: int,
        capacity: int,
        state_dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        cache = network.new_cache(rows, capacity, state_dtype, generator)
        super().__init__(network, cache, state_dtype, network.backbone.layers, network.backbone.norm_f)

    def forward(self, tokens: Tensor, counts: list[int] | None = None, hold: bool = False) -> Tensor:
        """Return the normalised hidden states [B, T, D] of tokens int64 [B, T]; see `Network.forward`."""
        if (native := self._native_for(tokens, counts)) is not None:
            return native.run(tokens, hold=hold)
        return self.network(tokens, cache=self.cache, counts=counts, hold=hold).hidden


class MTPRunner(_CachedLayers):
    """Runs a network's MTP block over a new cache; for the arguments see `Network.new_cache`."""

    def __init__(
        self,
        network: Network,
        rows: int,
        capacity: int,
        state_dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        cache = network.new_mtp_cache(rows, capacity, state_dtype, generator)
        assert network.mtp is not None, "the network has an MTP block"
        layers = network.mtp.layers
        join = [layers[0].get_submodule(name) for name in ("enorm", "hnorm", "eh_proj")]
        super().__init__(network, cache, state_dtype, layers, layers[-1].get_submodule("final_layernorm"), join)
        self._remembering = network.mtp.remembering

    def draft(self, tokens: Tensor, hidden: Tensor, counts: list[int] | None = None, hold: bool = False) -> Tensor:
        """Return the block's hidden states [B, T, D]; see `Network.draft`."""
        if (native := self._native_for(tokens, counts)) is not None:
            return native.run(tokens, hidden, hold)
        return self.network.draft(tokens, hidden, self.cache, counts, hold)

    def remember(self, tokens: Tensor, hidden: Tensor, counts: list[int] | None = None) -> None:
        """Do what `draft` does to the cache; see `Network.remember`."""
        if (native := self._native_for(tokens, counts)) is not None:
            native.run(tokens, hidden, layers=self._remembering)
        else:
            self.network.remember(tokens, hidden, self.cache, counts)
