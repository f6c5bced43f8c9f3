"""Greedy rounds of speculative decoding of one row, each in one call of C code; see `modules.generation.speculative`.

At batch 1 a small network computes a draft in less time than Python takes to ask for it. So everything between two
rounds stays in memory that the C code knows: tokens and hidden states that a round leaves are where the next one looks.
Shapes: T positions the MTP block has not seen, k drafts, D hidden, V vocabulary.
"""

import ctypes
from typing import cast

import torch
from torch import Tensor

from modules.backbone.cache import Cache
from modules.backbone.mtp import MTPBlock
from modules.backbone.native import NativeLayers, describe_linear
from modules.ops import native
from modules.precision.linear import FormattedModule


class NativeRounds:
    """Rounds of one row on the network's cache and the MTP block's; nothing else may change these in between.

    Args:
        embeddings: the embedding; with the head and the caches, `NativeRounds.fits` holds.
        head: the output head.
        block: the MTP block.
        cache: the network's cache.
        mtp_cache: the MTP block's cache.
        drafts: k, drafts of a round.
        vocabulary: drafts are among this many lowest ids.
    """

    def __init__(
        self,
        embeddings: FormattedModule,
        head: FormattedModule,
        block: MTPBlock,
        cache: Cache,
        mtp_cache: Cache,
        drafts: int,
        vocabulary: int,
    ) -> None:
        assert isinstance(cache.native, NativeLayers)
        assert isinstance(mtp_cache.native, NativeLayers)
        self._caches = cache, mtp_cache
        self._layers = cache.native, mtp_cache.native
        self._length = drafts + 1
        enorm, hnorm, eh_proj = (cast(Tensor, module.weight) for module in block.inputs())
        self._network = native.SpeculationArguments(
            layers=ctypes.addressof(cache.native.arguments),
            block=ctypes.addressof(mtp_cache.native.arguments),
            final=cache.native.final.data_ptr(),
            block_final=mtp_cache.native.final.data_ptr(),
            enorm=enorm.data_ptr(),
            hnorm=hnorm.data_ptr(),
            join=describe_linear(eh_proj),
            embeddings=describe_linear(embeddings.weight),
            head=describe_linear(head.weight),
            drafted=vocabulary,
        )
        width, size = head.weight.shape[1], head.weight.shape[0]
        self._own, self._block = ((ctypes.c_int64 * self._length)() for _ in range(2))
        self._states = torch.empty(self._length, width)
        scratch = max(
            layers.scratch_size(1, self._length, one.capacity)
            for layers, one in zip(self._layers, self._caches, strict=True)
        )
        self._memory = torch.empty(scratch + 4 * self._length * (2 * width + size) + 3 * 64, dtype=torch.uint8)
        self.seen = 0
        """T, tokens that the MTP block has not seen yet; 0: `begin` comes first."""

    @staticmethod
    def fits(embeddings: FormattedModule, head: FormattedModule, cache: Cache, mtp_cache: Cache, drafts: int) -> bool:
        """Return whether the C code can run rounds of k drafts on these caches."""
        layers = [one.native for one in (cache, mtp_cache)]
        dtypes = {one.dtype if isinstance(one, NativeLayers) else None for one in layers}
        return (
            all(isinstance(one, NativeLayers) and one.takes(1, drafts + 1) for one in layers)
            and len(dtypes) == 1
            and all(
                type(module.weight) is torch.nn.Parameter
                and {module.weight.dtype, module.compute_dtype} == dtypes
                and module.weight.is_contiguous()
                for module in (embeddings, head)
            )
        )

    def begin(self, tokens: list[int], states: Tensor) -> None:
        """Start from what other code has left.

        Args:
            tokens: T that the MTP block has not seen, the newest last, which the network has not seen either.
            states: [T, D], the network's hidden states at the positions before them.
        """
        self.seen = len(tokens)
        self._own[: self.seen] = tokens
        self._states[: self.seen] = states
        self._passes = [
            layers.prepare(one, 1, self._length, hold=True)
            for layers, one in zip(self._layers, self._caches, strict=True)
        ]
        self._network.whole, self._network.draft = map(ctypes.addressof, self._passes)

    def run(self) -> int:
        """Run a round: the MTP block's cache takes over T tokens; return how many drafts are right.

        Those, and the network's own choice after them, are `tokens` then.
        """
        library, _ = native.load()
        assert library is not None
        whole, draft = self._caches
        seen, length = self.seen, self._length
        assert whole.lengths[0] + length <= whole.capacity
        assert draft.lengths[0] + seen < draft.capacity
        (starts, draft_starts) = (layers.starts for layers in self._layers)
        starts[0], draft_starts[0] = whole.lengths[0], draft.lengths[0]
        states, memory = self._states.data_ptr(), self._memory
        failed = library.superbolt_speculate(
            ctypes.byref(self._network),
            self._own,
            seen,
            states,
            length - 1,
            self._block,
            self._own,
            states,
            memory.data_ptr(),
            len(memory),
        )
        assert not failed, "the C code has enough memory"
        draft.lengths[0] += seen
        drafts, own = self._block[1:], self._own[:]
        accepted = 0
        while accepted < length - 1 and drafts[accepted] == own[accepted]:
            accepted += 1
        self.seen = accepted + 1
        library.superbolt_advance(
            ctypes.byref(self._passes[0]), self._layers[0].arguments, (ctypes.c_int64 * 1)(self.seen)
        )
        whole.lengths[0] += self.seen
        return accepted

    @property
    def tokens(self) -> list[int]:
        """T tokens that the MTP block has not seen yet: what the newest round yielded."""
        return self._own[: self.seen]

    @property
    def states(self) -> Tensor:
        """fp32 [T, D], the network's hidden states at the positions before `tokens`."""
        return self._states[: self.seen]
