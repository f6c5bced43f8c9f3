"""A greedy round of speculative decoding of one row in one call of C code, see `modules.generation.speculative`.

At batch 1 a small network computes a draft in less time than Python takes to ask for it.
Shapes: T positions the MTP block has not seen, k drafts, D hidden, V vocabulary.
"""

import ctypes
from typing import NamedTuple, cast

import torch
from torch import Tensor

from modules.backbone.cache import Cache
from modules.backbone.mtp import MTPBlock
from modules.backbone.native import NativeLayers, describe_linear
from modules.ops import native
from modules.precision.linear import FormattedModule


class Round(NamedTuple):
    """What a round finds."""

    drafts: list[int]
    """k drafts."""
    own: list[int]
    """k + 1: the network's most likely token after the newest one and after each draft."""
    hidden: Tensor
    """fp32 [k + 1, D], the network's hidden states there."""


class NativeRounds:
    """Rounds of one row on two caches.

    Args:
        embeddings: the embedding.
        head: the output head.
        block: the MTP block.
        cache: the network's cache.
        mtp_cache: the MTP block's cache.
    """

    def __init__(
        self, embeddings: FormattedModule, head: FormattedModule, block: MTPBlock, cache: Cache, mtp_cache: Cache
    ) -> None:
        assert isinstance(cache.native, NativeLayers)
        assert isinstance(mtp_cache.native, NativeLayers)
        self._cache, self._mtp_cache = cache, mtp_cache
        self._whole, self._block = cache.native, mtp_cache.native
        enorm, hnorm, eh_proj = (cast(Tensor, module.weight) for module in block.inputs())
        self._arguments = native.SpeculationArguments(
            layers=ctypes.addressof(self._whole.arguments),
            block=ctypes.addressof(self._block.arguments),
            final=self._whole.final.data_ptr(),
            block_final=self._block.final.data_ptr(),
            enorm=enorm.data_ptr(),
            hnorm=hnorm.data_ptr(),
            join=describe_linear(eh_proj),
            embeddings=describe_linear(embeddings.weight),
            head=describe_linear(head.weight),
        )
        self._width, self._vocabulary = head.weight.shape[1], head.weight.shape[0]
        self._memory = torch.empty(0, dtype=torch.uint8)

    @staticmethod
    def fits(embeddings: FormattedModule, head: FormattedModule, cache: Cache, mtp_cache: Cache) -> bool:
        """Return whether the C code can run rounds on these caches."""
        natives = [one.native for one in (cache, mtp_cache)]
        dtypes = {one.dtype if isinstance(one, NativeLayers) else None for one in natives}
        return len(dtypes) == 1 and all(
            type(module.weight) is torch.nn.Parameter
            and {module.weight.dtype, module.compute_dtype} == dtypes
            and module.weight.is_contiguous()
            for module in (embeddings, head)
        )

    def takes(self, length: int) -> bool:
        """Return whether a pass of k + 1 = `length` positions is one for this code."""
        return len(self._cache.lengths) == 1 and self._whole.takes(1, length)

    def run(self, tokens: list[int], states: Tensor, drafts: int, vocabulary: int) -> Round:
        """Run a round: the MTP block's cache takes over T tokens, the network's cache holds k + 1.

        Args:
            tokens: T that the MTP block has not seen, the newest last.
            states: fp32 [T, D], contiguous: the network's hidden states at the positions before them.
            drafts: k.
            vocabulary: drafts are among this many lowest ids.
        """
        library, _ = native.load()
        assert library is not None
        seen, length = len(tokens), drafts + 1
        self._cache.begin(length, None, True)
        self._mtp_cache.begin(seen, None, False)
        given = self._arguments
        passes = [
            layers.prepare(cache, 1, length, hold=True)
            for layers, cache in ((self._whole, self._cache), (self._block, self._mtp_cache))
        ]
        given.whole, given.draft = (ctypes.addressof(one) for one in passes)
        given.drafted = vocabulary
        hidden = torch.empty(length, self._width)
        block, own = (ctypes.c_int64 * length)(), (ctypes.c_int64 * length)()
        memory = self._scratch(max(seen, length))
        failed = library.superbolt_speculate(
            ctypes.byref(given),
            (ctypes.c_int64 * seen)(*tokens),
            seen,
            states.data_ptr(),
            drafts,
            block,
            own,
            hidden.data_ptr(),
            memory.data_ptr(),
            len(memory),
        )
        assert not failed, "the C code has enough memory"
        self._mtp_cache.end()
        return Round(block[1:], own[:], hidden)

    def _scratch(self, length: int) -> Tensor:
        size = max(
            layers.scratch_size(1, length, cache.capacity)
            for layers, cache in ((self._whole, self._cache), (self._block, self._mtp_cache))
        )
        size += 4 * length * (2 * self._width + self._vocabulary) + 3 * 64
        if len(self._memory) < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        return self._memory
