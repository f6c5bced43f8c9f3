"""Greedy rounds of speculative decoding of one row, each in one call of C code; see `modules.generation.speculative`.

At batch 1 a small network computes a draft in less time than Python takes to ask for it. So everything between two
rounds stays in memory that the C code knows: tokens and hidden states that a round leaves are where the next one looks.
Shapes: T positions the MTP block has not seen, k drafts, D hidden, V vocabulary.
"""

import ctypes

import torch
from torch import Tensor

from modules.backbone.cache import Cache
from modules.backbone.native import NativeLayers, describe_linear
from modules.ops import native
from modules.precision.linear import Head


class NativeRounds:
    """Rounds of one row on the network's cache and the MTP block's; nothing else may change these in between.

    Args:
        head: the output head; with the caches, `NativeRounds.fits` holds.
        cache: the network's cache.
        mtp_cache: the MTP block's cache.
        drafts: k, drafts of a round.
        vocabulary: drafts are among this many lowest ids.
    """

    def __init__(self, head: Head, cache: Cache, mtp_cache: Cache, drafts: int, vocabulary: int) -> None:
        assert isinstance(cache.native, NativeLayers)
        assert isinstance(mtp_cache.native, NativeLayers)
        self._caches, self._layers = (cache, mtp_cache), (cache.native, mtp_cache.native)
        self._head, self._vocabulary, self._length = describe_linear(head.weight), vocabulary, drafts + 1
        self._own, self._proposed = ((ctypes.c_int64 * self._length)() for _ in range(2))
        size, width = head.weight.shape
        self._states = torch.empty(self._length, width, dtype=head.compute_dtype)
        passes = max(
            len(layers.scratch(1, self._length, one.capacity))
            for layers, one in zip(self._layers, self._caches, strict=True)
        )
        self._memory = torch.empty(passes + 4 * self._length * (2 * width + size) + 3 * 64, dtype=torch.uint8)
        self.seen = 0
        """T, tokens that the MTP block has not seen yet; 0: `begin` comes first."""

    @staticmethod
    def fits(head: Head, cache: Cache, mtp_cache: Cache, drafts: int) -> bool:
        """Return whether the C code can run rounds of k drafts on these caches."""
        layers = [one.native for one in (cache, mtp_cache)]
        return (
            all(isinstance(one, NativeLayers) and one.takes(1, drafts + 1) for one in layers)
            and type(head.weight) is torch.nn.Parameter
            and {one.dtype for one in layers if isinstance(one, NativeLayers)} == {head.weight.dtype}
            and head.compute_dtype == head.weight.dtype
            and head.weight.is_contiguous()
        )

    def begin(self, tokens: list[int], states: Tensor) -> None:
        """Start from what other code has left.

        Args:
            tokens: T that the MTP block has not seen, the newest last, which the network has not seen either.
            states: [T, D] in the compute dtype, the network's hidden states at the positions before them.
        """
        self.seen = len(tokens)
        self._own[: self.seen] = tokens
        self._states[: self.seen] = states
        for layers, cache in zip(self._layers, self._caches, strict=True):
            layers.prepare(cache, self._length, hold=True)

    def run(self) -> int:
        """Run a round; return how many drafts are right.

        Those, and the network's own choice after them, are `tokens` then; the caches know the rest.
        """
        library, _ = native.load()
        assert library is not None
        seen, length, states = self.seen, self._length, self._states.data_ptr()
        for layers, cache, ahead in zip(self._layers, self._caches, (length, seen + 1), strict=True):
            layers.starts[0] = cache.lengths[0]
            assert cache.lengths[0] + ahead <= cache.capacity
        whole, draft = self._layers
        failed = library.superbolt_speculate(
            ctypes.byref(whole.given),
            whole.arguments,
            ctypes.byref(draft.given),
            draft.arguments,
            ctypes.byref(self._head),
            self._vocabulary,
            self._own,
            seen,
            states,
            length - 1,
            self._proposed,
            self._own,
            states,
            self._memory.data_ptr(),
            len(self._memory),
        )
        assert not failed, "the C code has enough memory"
        drafts, own = self._proposed[1:], self._own[:]
        accepted = 0
        while accepted < length - 1 and drafts[accepted] == own[accepted]:
            accepted += 1
        self.seen = accepted + 1
        library.superbolt_advance(ctypes.byref(whole.given), whole.arguments, (ctypes.c_int64 * 1)(self.seen))
        for cache, count in zip(self._caches, (self.seen, seen), strict=True):
            cache.lengths[0] += count
        return accepted

    @property
    def tokens(self) -> list[int]:
        """T tokens that the MTP block has not seen yet: what the newest round yielded."""
        return self._own[: self.seen]

    @property
    def states(self) -> Tensor:
        """[T, D] in the compute dtype, the network's hidden states at the positions before `tokens`."""
        return self._states[: self.seen]
