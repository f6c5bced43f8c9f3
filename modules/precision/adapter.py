"""A low-rank addition to the results of a linear layer: y + alpha / rank x B A x (LoRA, arXiv 2106.09685).

It is a child of the layer it adapts, so that it is sharded, gathered and moved with it. Of experts each has its own A
and B, which multiply the rows routed to it: no [E, O, I] of differences exists, forward or backward.
Shapes: E experts, R rows, r rank, I in-features, O out-features.
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.ops.experts import grouped_linear
from modules.ops.kernels import uncompiled


def seed_of(*parts: object) -> int:
    """Return a seed, 0 to 2**63 - 1, made of numbers and names."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Adapter(nn.Module):
    """A and B beside one weight; they are multiplied in the dtype that inputs have there.

    Args:
        shape: of the weight, [O, I] or [E, O, I].
        rank: r.
        scale: what B A is multiplied by.
        dropout: share of the inputs that A does not see in training.
    """

    def __init__(self, shape: torch.Size, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        *experts, out_features, in_features = shape
        self.A = nn.Parameter(torch.empty(*experts, rank, in_features))
        self.B = nn.Parameter(torch.empty(*experts, out_features, rank))
        self.scale, self.dropout = scale, dropout
        self.seed = 0
        """Of the dropout of the next passes. They draw the same inputs until it changes: a recomputed layer those of
        its first pass, an MTP block those of its first depth."""

    def forward(self, x: Tensor, out: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return `out` plus what the adapter adds, in its dtype.

        Args:
            x: inputs [..., I] of the layer, in its compute dtype; with experts [R, I], sorted by expert.
            out: its results [..., O].
            offsets: int32 [E], end row of each expert; None: there are no experts.
        """
        if self.dropout and self.training:
            x = self._drop(x)
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        if offsets is None:
            added = F.linear(F.linear(x, A), B)
        else:
            added = grouped_linear(grouped_linear(x, A, offsets), B, offsets)
        return torch.add(out, added, alpha=self.scale)

    @uncompiled  # its random numbers come from a generator of its own
    def _drop(self, x: Tensor) -> Tensor:
        kept = torch.empty_like(x)
        if x.device.type != "meta":
            kept.bernoulli_(1 - self.dropout, generator=torch.Generator(x.device).manual_seed(self.seed))
        return x * kept.div_(1 - self.dropout)

    def fill(self, name: str, values: Tensor, generator: torch.Generator) -> Tensor:
        """Return fp32 initial values of A (uniform, as in peft) or B (0), written over `values` [r, I] or [O, r]."""
        if name == "B":
            return values.zero_()
        bound = 1 / math.sqrt(values.shape[-1])
        return values.uniform_(-bound, bound, generator=generator)
