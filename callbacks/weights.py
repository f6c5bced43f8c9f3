"""What training does to the weights of matrix products: gradients that are exactly zero, weights and channels that die.

Single zeros and channels are what Nemotron 3 Super was watched for (arXiv 2604.12374, section 2.2): in NVFP4 about
three times as many weight gradients are zero as in bf16, because operands underflow; then whole channels of the up
projections and the channels of the down projections that read them decay. A weight whose gradient is finite but all
zero, though there was something to learn, has stopped learning: elsewhere a known silent failure, behind a loss that
goes on falling by what the other weights learn.

An expert has something to learn where a gradient that is not zero reaches its results. A token is not enough: nothing
is asked of padding and of the ends of documents, and the gradient of an expert that got nothing else is zero as it
should be.
Shapes: W weights, E experts, O out-features, I in-features, R rows sorted by expert, L their width.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from callbacks.step import curve_name, with_summary
from modules.backbone.initialization import local_part, local_rows
from modules.backbone.latent_moe import Experts
from modules.backbone.model import Network
from modules.backbone.router import Router
from modules.base import StageModule
from modules.ops.experts import row_experts
from modules.precision.linear import GroupedLinear, Linear

DECAYED = 0.25 / 6
"""Norm of a channel over the median of its module's, up to which it has decayed: where a median channel sets the scale
of a 16 x 16 tile, NVFP4 rounds to zero what is 24 times smaller than the tile's largest number."""
SHOWN = 8
"""Weights that a console line names."""
KEPT = 1000
"""Newest steps that wait to be read."""


class Weight(NamedTuple):
    """A weight of a matrix product."""

    name: str
    """Of its module."""
    parameter: nn.Parameter
    """[O, I], or [E, O, I] of experts; the head's, the embedding's too where they are tied."""
    router: int | None
    """Which of `Network.routers()` sends tokens to its experts; None: it is no stack of experts."""


def product_weights(network: Network) -> Iterator[Weight]:
    """Yield the trained weights of the matrix products in a format of the recipe; of adapters B alone.

    A has no gradient until B, which starts at zero, has moved.
    """
    router = -1
    for name, module in network.named_modules():
        router += isinstance(module, Router)  # each stands before the experts that it chooses
        if isinstance(module, Linear | GroupedLinear):
            stack = router if isinstance(module, GroupedLinear) else None
            if module.weight.requires_grad:
                yield Weight(name, module.weight, stack)
            if module.adapter is not None:
                yield Weight(f"{name}.adapter", module.adapter.B, stack)


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


class _PassedStep(NamedTuple):
    number: int
    names: list[str]
    sums: Tensor
    """fp32 [W], of this rank: sums of the gradients' magnitudes; 0 where every element is."""
    losses: Tensor
    """See `part_losses`."""


class PassingSteps:
    """The steps between those that are looked at closely: the modules that had no gradient at all in them.

    A step costs one pass over the gradients (a millisecond for a million of their elements on a CPU) and never waits
    for the device.
    """

    def __init__(self, network: Network) -> None:
        self._weights = {curve_name(weight.name): weight.parameter for weight in product_weights(network)}
        self._gradients: tuple[list[str], Tensor]
        self._steps: deque[_PassedStep] = deque(maxlen=KEPT)

    def look_at_gradients(self) -> None:
        """Look at the accumulated gradients of a step."""
        found = {name: weight.grad for name, weight in self._weights.items() if weight.grad is not None}
        sums = torch._foreach_norm([local_part(gradient) for gradient in found.values()], 1)
        self._gradients = [*found], torch.stack(sums)

    def end_step(self, number: int, module: StageModule) -> None:
        """Keep what was seen of a finished step."""
        self._steps.append(_PassedStep(number, *self._gradients, part_losses(module)))

    def read(self, module: StageModule) -> Iterator[tuple[int, list[str], list[str]]]:
        """Yield each step's number with what `dead_and_alive` says of it, and forget it; all ranks call this."""
        steps = [*self._steps]
        self._steps.clear()
        if not steps:
            return
        sums = module.strategy.all_reduce(torch.cat([step.sums for step in steps]))
        losses = torch.cat([step.losses for step in steps]).to(sums.device)
        values = iter(torch.cat([sums, losses]).tolist())
        by_step = [{name: next(values) for name in step.names} for step in steps]
        for step, totals in zip(steps, by_step, strict=True):
            gradients = {name: (float(total == 0), 1.0, 0.0) for name, total in totals.items()}
            yield step.number, *dead_and_alive(gradients, {}, next(values), next(values))


def part_losses(module: StageModule) -> Tensor:
    """Return fp32 [2]: what the network's loss was in the last step, and the MTP block's; 0 where it had no target."""
    loss = torch.as_tensor(module.metrics.get("training/next_token_loss", module.metrics["training/loss"]))
    mtp = [torch.as_tensor(value) for name, value in module.metrics.items() if name.startswith("training/mtp_loss_")]
    return torch.stack([loss, module.mtp_loss_factor * torch.stack(mtp).sum() if mtp else torch.zeros_like(loss)])


def dead_and_alive(
    gradients: Mapping[str, Sequence[float]], experts: Mapping[str, Sequence[float]], loss: float, mtp_loss: float
) -> tuple[list[str], list[str]]:
    """Return the weights whose gradient is zero everywhere though there was something to learn; those with another.

    Those of a stack of experts together; where some have a gradient, each by itself too.

    Args:
        gradients: module -> the numbers of `split_gradient`.
        experts: module -> the numbers of `expert_states`.
        loss: see `part_losses`.
        mtp_loss: see there.
    """
    dead, alive = [], []
    for name, (zeros, elements, _) in gradients.items():
        if zeros < elements:
            states = {f"{name}[{expert}]": state for expert, state in enumerate(experts.get(name, ()))}
            alive += [name, *(expert for expert, state in states.items() if state > 0)]
            dead += [expert for expert, state in states.items() if state < 0]
        elif elements and (mtp_loss if name.startswith("mtp_") else loss):
            dead.append(name)
    return dead, alive


def dead_line(step: int, weights: Sequence[str]) -> str:
    """Return the console line for weights whose gradient has become zero."""
    named = ", ".join(weights[:SHOWN]) + (f" and {len(weights) - SHOWN} more" if len(weights) > SHOWN else "")
    return f"warning: step {step}: the gradient is finite but zero everywhere, nothing is learnt there: {named}"


class ExpertRows:
    """Counts, from now on, the rows of each expert that a gradient reaches."""

    def __init__(self, network: Network) -> None:
        stacks = {name: module for name, module in network.named_modules() if isinstance(module, Experts)}
        device = next(network.parameters()).device
        self._counts = {
            name: torch.zeros(len(module.up_proj.weight), dtype=torch.int64, device=device)
            for name, module in stacks.items()
        }
        self._handles = [
            module.register_forward_hook(partial(_watch, self._counts[name])) for name, module in stacks.items()
        ]

    def end(self, module: StageModule) -> dict[str, Tensor]:
        """Stop counting.

        All ranks call this.

        Returns:
            Name of each stack of weights -> int64 [E], of all ranks.
        """
        for handle in self._handles:
            handle.remove()
        if not self._counts:
            return {}
        counts = module.strategy.all_reduce(torch.stack([*self._counts.values()]))
        return {
            f"{name}.{weight}": rows
            for name, rows in zip(self._counts, counts, strict=True)
            for weight in ("up_proj", "down_proj")
        }


def _watch(counts: Tensor, module: nn.Module, inputs: tuple[Tensor, Tensor], out: Tensor) -> None:
    """Count when the gradient of the experts' results [R, L] comes; a forward hook."""
    if out.requires_grad:
        out.register_hook(partial(_count, counts, inputs[1]))


def _count(counts: Tensor, offsets: Tensor, grad: Tensor) -> None:
    reached = (grad != 0).any(1).long()  # NaN is not zero
    counts.index_add_(0, row_experts(len(grad), offsets), reached)
