"""What training does to the weights of matrix products: gradient elements that are exactly zero, channels that die.

Both are what Nemotron 3 Super was watched for (arXiv 2604.12374, section 2.2): in NVFP4 about three times as many
weight gradients are zero as in bf16, because operands underflow; then whole channels of the up projections and the
channels of the down projections that read them decay.
Shapes: E experts, O out-features, I in-features.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from callbacks.curves import with_summary
from modules.backbone.initialization import local_part, local_rows
from modules.backbone.model import Network
from modules.backbone.router import Router
from modules.precision.linear import GroupedLinear, Linear

DECAYED = 0.25 / 6
"""Norm of a channel over the median of its module's, up to which it has decayed: where a median channel sets the scale
of a 16 x 16 tile, NVFP4 rounds to zero what is 24 times smaller than the tile's largest number."""


class Weight(NamedTuple):
    """A weight of a matrix product."""

    name: str
    """Of its module."""
    parameter: nn.Parameter
    """[O, I], or [E, O, I] of experts; the head's, the embedding's too where they are tied."""
    router: int | None
    """Which of `Network.routers()` sends tokens to its experts; None: it is no stack of experts."""


def product_weights(network: Network) -> Iterator[Weight]:
    """Yield the trained weights of the matrix products in a format of the recipe."""
    router = -1
    for name, module in network.named_modules():
        router += isinstance(module, Router)  # each stands before the experts that it chooses
        if isinstance(module, Linear | GroupedLinear) and module.weight.requires_grad:
            yield Weight(name, module.weight, router if isinstance(module, GroupedLinear) else None)


def count_gradient(parameter: nn.Parameter, stack: bool) -> Tensor:
    """Return int64 [2, E] (without `stack` [2, 1]): elements of the gradient that are not zero, and all, of this rank.

    What is not finite is not zero.
    """
    assert parameter.grad is not None
    gradient, rows = local_part(parameter.grad), local_rows(parameter)
    counts = torch.zeros(2, parameter.shape[0] if stack else 1, dtype=torch.int64, device=gradient.device)
    place = slice(rows[0], rows[-1] + 1) if stack and rows else slice(0, 1)
    if rows:
        nonzero = torch.count_nonzero(gradient, dim=(1, 2) if stack else (0, 1))
        counts[0, place], counts[1, place] = nonzero, gradient.numel() // (len(rows) if stack else 1)
    return counts


def split_gradient(counts: Tensor, tokens: Tensor | None) -> Tensor:
    """Return int64 [3]: zeros and elements of a gradient where there were tokens, elements where there were none.

    Args:
        counts: int64 [2, E] or [2, 1], see `count_gradient`, of all ranks.
        tokens: int64 [E], tokens that each expert got; None: it is no stack of experts.
    """
    nonzero, elements = counts
    busy = torch.ones_like(elements) if tokens is None else (tokens > 0).long()
    return torch.stack([((elements - nonzero) * busy).sum(), (elements * busy).sum(), (elements * (1 - busy)).sum()])


def expert_states(counts: Tensor, rows: Tensor) -> Tensor:
    """Return int64 [E]: 1 of experts that have a gradient, -1 of those that have none and should, 0 of the others.

    Args:
        counts: int64 [2, E], see `count_gradient`, of all ranks.
        rows: int64 [E], rows that a gradient reached, see `ExpertRows`.
    """
    return torch.where(counts[0] > 0, 1, -(rows > 0).long())


def gradient_metrics(sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the curves of module -> the three numbers of `split_gradient`."""
    shares = {name: zeros / elements for name, (zeros, elements, _) in sums.items() if elements}
    metrics = with_summary("gradients/zero_share", shares, max)
    zeros, elements, idle = (sum(numbers) for numbers in zip(*sums.values(), strict=True))
    if elements:
        metrics["gradients/zero_share/all"] = zeros / elements
    if elements + idle:
        metrics["gradients/zero_share/without_tokens"] = idle / (elements + idle)
    return metrics


def channel_squares(weight: Weight) -> Tensor:
    """Return this rank's part of the squared norms, fp32, of the channels between an up and its down projection.

    Args:
        weight: of an up projection, whose output channels they are, or of a down projection, whose input channels.

    Returns:
        [O] of an up projection, [I] of a down projection; [E, O] and [E, I] of experts. Ranks add up to the whole.
    """
    local, rows = local_part(weight.parameter.detach()), local_rows(weight.parameter)
    up = weight.name.endswith("up_proj")
    squares = local.square().sum(-1 if up else -2)
    if weight.router is None and not up:
        return squares
    whole = squares.new_zeros(weight.parameter.shape[0], *squares.shape[1:])
    if rows:
        whole[rows[0] : rows[-1] + 1] = squares
    return whole


def decayed_share(squares: Tensor) -> Tensor:
    """Return the share, fp32 scalar, of channels whose norm is at most `DECAYED` of the median, from squared norms."""
    return (squares <= DECAYED**2 * squares.median()).float().mean()
