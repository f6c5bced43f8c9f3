"""Weights that have stopped learning: their gradient is finite but all zero, though there was something to learn.

Elsewhere a known silent failure: the loss goes on falling, by what the other weights learn.
Shapes: W weights.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from callbacks.curves import curve_name
from callbacks.weights import product_weights
from modules.backbone.initialization import local_part
from modules.backbone.model import Network
from modules.base import StageModule

SHOWN = 8
"""Weights that a console line names."""
KEPT = 1000
"""Newest steps that wait to be read."""


class _Step(NamedTuple):
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

    Args:
        network: the network.
    """

    def __init__(self, network: Network) -> None:
        self._weights = {curve_name(weight.name): weight.parameter for weight in product_weights(network)}
        self._gradients: tuple[list[str], Tensor]
        self._steps: deque[_Step] = deque(maxlen=KEPT)

    def look_at_gradients(self) -> None:
        """Look at the accumulated gradients of a step."""
        found = {name: weight.grad for name, weight in self._weights.items() if weight.grad is not None}
        sums = torch._foreach_norm([local_part(gradient) for gradient in found.values()], 1)
        self._gradients = [*found], torch.stack(sums)

    def end_step(self, number: int, module: StageModule) -> None:
        """Keep what was seen of a finished step."""
        self._steps.append(_Step(number, *self._gradients, part_losses(module)))

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
