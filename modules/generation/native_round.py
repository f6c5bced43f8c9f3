"""Rounds of speculative decoding of one row in C code; see `modules.generation.speculative`.

At batch 1 a small network computes a draft in less time than Python takes to ask for it. So everything between two
rounds stays in memory that the C code knows: tokens and hidden states that a round leaves are where the next one looks.
Shapes: T positions the MTP block has not seen, k drafts, D hidden, V vocabulary, N drafted vocabulary.
"""

import ctypes

import torch
from torch import Tensor

from modules.generation.native import NativeLayers
from modules.ops.native import describe_linear
from modules.precision.linear import Head


class NativeRounds:
    """Rounds of one row on the network's cache and the MTP block's; nothing else may change these in between.

    Args:
        head: the output head; with the layers, `NativeRounds.fits` holds.
        layers: the network's layers.
        mtp_layers: the MTP block's layers.
        drafts: k, drafts of a round.
        vocabulary: N, drafts are among this many lowest ids.
        temperature: divides the logits before tokens are drawn; 0 takes the most likely ones.
    """

    def __init__(
        self,
        head: Head,
        layers: NativeLayers,
        mtp_layers: NativeLayers,
        drafts: int,
        vocabulary: int,
        temperature: float,
    ) -> None:
        self._layers = layers, mtp_layers
        assert head.product.operands is not None
        self._head = describe_linear(head.weight, head.product.operands, layers.dtype)
        self._kept = head.weight, head.product
        self._vocabulary, self._temperature = vocabulary, temperature
        self._drafts = drafts
        self._own, self._proposed = ((ctypes.c_int64 * (drafts + 1))() for _ in range(2))
        self._proposals = torch.empty(drafts, vocabulary)
        size, width = head.weight.shape
        self._states = torch.empty(drafts + 1, width, dtype=layers.dtype)
        passes = max(len(one.scratch(1, drafts + 1)) for one in self._layers)
        self._memory = torch.empty(passes + 4 * (drafts + 1) * (2 * width + size) + 3 * 64, dtype=torch.uint8)
        self.seen = 0
        """T, tokens that the MTP block has not seen yet; 0: `begin` comes first."""

    @staticmethod
    def fits(head: Head, layers: NativeLayers, mtp_layers: NativeLayers, drafts: int) -> bool:
        """Return whether the C code can run rounds of k drafts."""
        return (
            layers.takes(1, drafts + 1)
            and mtp_layers.takes(1, drafts + 1)
            and type(head.weight) is torch.nn.Parameter
            and head.product.operands is not None
            and head.compute_dtype == head.weight.dtype
            and head.weight.is_contiguous()
        )

    def begin(self, tokens: list[int], states: Tensor) -> None:
        """Start from what other code has left.

        Args:
            tokens: T that the MTP block has not seen, the newest last, which the network has not seen either.
            states: [T, D] in the dtype of the residual stream, those of the network at the positions before.
        """
        self.seen = len(tokens)
        self._own[: self.seen] = tokens
        self._states[: self.seen] = states
        for layers in self._layers:
            layers.prepare(self._drafts + 1, hold=True)

    def draft(self, uniforms: list[float]) -> None:
        """Draft k tokens: the MTP block's cache takes over T tokens.

        Args:
            uniforms: k numbers in [0, 1) that draw the drafts; empty for the most likely ones.
        """
        layers, cache, seen = self._layers[1], self._layers[1].cache, self.seen
        assert cache.lengths[0] + seen < cache.capacity
        layers.starts[0] = cache.lengths[0]
        failed = layers.library.superbolt_draft(
            ctypes.byref(layers.given),
            layers.arguments,
            ctypes.byref(self._head),
            self._vocabulary,
            self._own,
            seen,
            self._states.data_ptr(),
            self._drafts,
            self._temperature,
            (ctypes.c_double * len(uniforms))(*uniforms),
            self._proposals.data_ptr(),
            self._proposed,
            self._memory.data_ptr(),
            len(self._memory),
        )
        assert not failed, "the C code has enough memory"
        cache.lengths[0] += seen

    def verify(self, uniforms: list[float]) -> int:
        """Run the network over newest token and drafts; its cache takes over the newest and the drafts kept.

        Args:
            uniforms: k + 1 numbers in [0, 1): one for each draft, the last for the network's own token; empty for the
                most likely tokens.

        Returns:
            Number of drafts kept; those and the network's own token are `tokens` then.
        """
        layers, cache = self._layers[0], self._layers[0].cache
        assert cache.lengths[0] + self._drafts < cache.capacity
        layers.starts[0] = cache.lengths[0]
        kept = layers.library.superbolt_verify(
            ctypes.byref(layers.given),
            layers.arguments,
            ctypes.byref(self._head),
            self._vocabulary,
            self._drafts,
            self._temperature,
            (ctypes.c_double * len(uniforms))(*uniforms),
            self._proposals.data_ptr(),
            self._proposed,
            self._own,
            self._states.data_ptr(),
            self._memory.data_ptr(),
            len(self._memory),
        )
        assert kept >= 0, "the C code has enough memory"
        self.seen = kept + 1
        layers.library.superbolt_advance(ctypes.byref(layers.given), layers.arguments, (ctypes.c_int64 * 1)(self.seen))
        cache.lengths[0] += self.seen
        return kept

    @property
    def tokens(self) -> list[int]:
        """T tokens that the MTP block has not seen yet: what the newest round yielded."""
        return self._own[: self.seen]

    @property
    def states(self) -> Tensor:
        """[T, D] in the dtype of the residual stream, the network's hidden states at the positions before `tokens`."""
        return self._states[: self.seen]
