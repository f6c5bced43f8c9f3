"""Which token follows: greedy or drawn, with temperature, top-k, top-p and min-p as transformers defines them.

A draw is an inverse CDF: one uniform number of the row's own stream and the cumulative sum of the probabilities in
fp64. The stream depends on the seed and on the names of the row (which prompt, which sample) alone, so what a row draws
from given logits depends neither on its batch nor on the rows beside it. Python's Mersenne Twister costs 50 ns a
number; its `random()` is documented to stay the same for a seed.

Shapes: B rows, V vocabulary.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modules.errors import UserError

LEAST_TEMPERATURE = 1e-20
"""Below it quotients leave the range of fp32; far above it they already make one token certain, but for equals."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Raises:
        UserError: if a field is out of range; names it.
    """

    temperature: float = 0.0
    """Divides the logits; 0, like anything below `LEAST_TEMPERATURE`, takes the most likely token."""
    top_k: int = 0
    """Draw among the k most likely tokens only; 0: among all."""
    top_p: float = 1.0
    """Draw among the fewest most likely tokens that have this probability together, in (0, 1]; 1: among all."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the most likely one's probability, in [0, 1]; 0: none."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        """Check every field against its range."""
        for name, holds, range_ in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or a positive number"),
            ("top_k", self.top_k >= 0, "0 (off) or a positive number"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (off) to 1"),
        ):
            if not holds:
                raise UserError(f"{name}: {getattr(self, name)} must be {range_}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without a draw."""
        return self.temperature < LEAST_TEMPERATURE

    @property
    def whole(self) -> bool:
        """Whether every token can be drawn: no top-k, top-p or min-p."""
        return not self.top_k and self.top_p == 1 and not self.min_p

    def stream(self, key: tuple[int, ...]) -> random.Random:
        """Return the random numbers of the row that `key` names."""
        return random.Random(f"{self.seed} {key}")  # of a text: all its bits count (SHA-512)


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities that the next token is drawn from.

    Temperature, top-k, top-p and min-p apply in this order, each to the normalised rest that the ones before left: the
    order and the rules of transformers' logits processors. Tokens exactly as likely as the last one that stays do so,
    too (transformers' top-p leaves out some of them).

    Args:
        logits: fp32 [..., V].
        sampling: with a temperature above 0.

    Returns:
        fp32 [..., V].
    """
    assert not sampling.greedy
    scores = logits / sampling.temperature
    probabilities = scores.softmax(-1)
    if 0 < sampling.top_k < scores.shape[-1]:
        probabilities *= scores >= scores.topk(sampling.top_k).values[..., -1:]
    if sampling.top_p < 1:
        probabilities *= probabilities >= _least_of_nucleus(probabilities, sampling.top_p)
    if sampling.min_p > 0:
        probabilities *= probabilities >= sampling.min_p * probabilities.amax(-1, keepdim=True)
    return probabilities / probabilities.sum(-1, keepdim=True)


def _least_of_nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Return [..., 1]: the least probability among the fewest tokens that have the share `top_p` together.

    Sorting costs more than all layers of a small network; numpy sorts five times as fast as torch on a CPU.
    """
    if probabilities.is_cpu:
        ascending = torch.from_numpy(np.sort(probabilities.numpy(), axis=-1))
    else:
        ascending = probabilities.sort(-1).values
    sums = ascending.cumsum(-1, dtype=torch.float64)
    first = torch.searchsorted(sums, (1 - top_p) * sums[..., -1:], right=True)
    return ascending.gather(-1, first.clamp(max=ascending.shape[-1] - 1))  # 1 - top_p may round to 1


def draw(probabilities: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Draw a token for each row by inverse CDF; a token of probability 0 is never drawn.

    Args:
        probabilities: [B, V], of any sum.
        uniforms: B numbers in [0, 1).

    Returns:
        int64 [B].
    """
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    points = torch.tensor(uniforms, dtype=torch.float64, device=cumulative.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, points, right=True)[:, 0]
