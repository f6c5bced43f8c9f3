"""Is training in few bits healthy: what quantising takes from the operands, and what that does to the weights.

A product in NVFP4 fails silently: an operand underflows, gradients become zero, their channels decay, and the loss
falls on. The weights are looked at in every run, so that one in bf16 can be compared.

Whether a gradient is all zero is asked in every step; all else is computed every so many steps only, on the device, and
read once, when the step is logged. Values are of the whole step, over its micro-batches and all ranks.
Shapes: W weights, S operands, E experts.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from callbacks.operands import OperandSums
from callbacks.step import StepCallback, begins_due_step, check_interval, curve_name, stage, with_summary
from callbacks.text import fold
from callbacks.weights import (
    ExpertRows,
    PassingSteps,
    channel_squares,
    count_gradient,
    dead_and_alive,
    dead_line,
    decayed_share,
    expert_states,
    gradient_metrics,
    part_losses,
    product_weights,
    split_gradient,
)
from modules.backbone.model import Network
from modules.base import StageModule
from modules.batch import Window
from modules.precision.recipe import quantized_schemes
from modules.precision.scheme import Scheme


class QuantizationHealth(StepCallback):
    """Logs `quantization/...`, `gradients/...` and `weights/...`, and warns of weights that have stopped learning.

    MODULE is a linear layer or the experts of a layer (`layer_03.in_proj`, `layer_01.experts.up_proj`), OPERAND a
    product and one of its tensors (`fprop.x`, see `operands.OPERANDS`). `.../worst` and `.../mean` are over modules.

    - `quantization/underflow/OPERAND/MODULE`: share of the elements that were not zero and are after quantising.
    - `quantization/saturation/MODULE`, the worst of its operands, and `quantization/saturation/OPERAND/...`: share of
      those that were clipped: beyond the format's largest number, at their scale, by more than half of its last step.
    - `quantization/snr_db/OPERAND/MODULE`: 10 log10(sum x^2 / sum (x - x')^2), x' what quantising leaves of x.
    - `gradients/zero_share/MODULE`: share of the elements of the step's weight gradient that are exactly zero;
      `gradients/zero_share/all`: of all weights together. Experts without a token have no part in either; how much of
      all weights is theirs is `gradients/zero_share/without_tokens`.
    - `gradients/dead_weights`: number of weights whose gradient was finite but zero everywhere, those of single experts
      too (`layer_01.experts.up_proj[3]`). Such a weight is named on the console, once until its gradient is back. Steps
      between points are named with the next point; single experts are looked at in points only.
    - `weights/decayed_channels/MODULE`: share of the output channels of an up projection, or of the input channels of a
      down projection, whose norm is at most `weights.DECAYED` of the module's median.

    Operands are shown by the emulated backend only.

    Args:
        every_n_steps: Optimiser steps between points (>= 1); there is one after the first step and after the last.
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        self.every_n_steps = check_interval(every_n_steps, "quantization_health.every_n_steps")
        self._watch: Watch | None = None
        self._passing: PassingSteps
        self._dead: set[str] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what cannot be looked at."""
        network = stage(pl_module).built_network
        self._passing = PassingSteps(network)
        for line in unseen_lines(quantized_schemes(network).values()):
            _print(line, trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Window, batch_idx: int) -> None:
        """Begin to look if the step that begins is due."""
        if begins_due_step(self.every_n_steps, trainer):
            self._watch = Watch(stage(pl_module).built_network)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the accumulated gradients, and at the weights that they are of."""
        if self._watch is not None:
            self._watch.look_at_weights(stage(pl_module))
        else:
            self._passing.look_at_gradients()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Window, batch_idx: int
    ) -> None:
        """Log a step that was looked at, and warn of it and of those since the last."""
        module = stage(pl_module)
        if self._watch is None:
            self._passing.end_step(trainer.global_step, module)
            return
        for step, dead, alive in self._passing.read(module):
            self._warn(step, dead, alive, trainer)
        metrics, dead, alive = self._watch.end(module)
        self._watch = None
        module.metrics.record_all(metrics)
        self._warn(trainer.global_step, dead, alive, trainer)

    def _warn(self, step: int, dead: list[str], alive: list[str], trainer: Trainer) -> None:
        """Name the weights of a step that are newly dead."""
        new = [name for name in dead if name not in self._dead]
        self._dead = self._dead.difference(alive).union(dead)
        if new:
            _print(dead_line(step, new), trainer)


class Watch:
    """Looks at a network during one step, from now on."""

    def __init__(self, network: Network) -> None:
        self._weights = list(product_weights(network))
        self._channels = [weight for weight in self._weights if weight.name.endswith(("up_proj", "down_proj"))]
        self._routers = {weight.name: weight.router for weight in self._weights}
        self._counts: dict[str, Tensor] = {}
        self._decayed: Tensor
        schemes = {
            curve_name(name): scheme
            for name, scheme in quantized_schemes(network).items()
            if scheme.backend.shows_operands
        }
        self._operands = OperandSums(schemes, next(network.parameters()).device)
        self._expert_rows = ExpertRows(network)
        self._arithmetics = {scheme.arithmetic for scheme in schemes.values()}
        for arithmetic in self._arithmetics:
            arithmetic.observer = self._operands.add

    def look_at_weights(self, module: StageModule) -> None:
        """Count the zeros of the gradients that there are, and the channels that have decayed; all ranks call this."""
        for weight in self._weights:
            if weight.parameter.grad is not None:
                self._counts[weight.name] = count_gradient(weight.parameter, weight.router is not None)
        squares = [channel_squares(weight) for weight in self._channels]
        self._decayed = torch.empty(0, device=module.device)
        if squares:
            whole = module.strategy.all_reduce(torch.cat([part.flatten() for part in squares]))
            parts = whole.split([part.numel() for part in squares])
            self._decayed = torch.stack([decayed_share(part) for part in parts])

    def end(self, module: StageModule) -> tuple[dict[str, float], list[str], list[str]]:
        """Stop looking.

        All ranks call this.

        Returns:
            The curves; the weights with a gradient of zeros though there was something to learn; those with another.
        """
        for arithmetic in self._arithmetics:
            arithmetic.observer = None
        counts = self._reduced_counts(module)
        rows = {name: count for name, count in self._expert_rows.end(module).items() if name in counts}
        states = [expert_states(counts[name], count) for name, count in rows.items()]
        operands, gradients, decayed, losses, experts = _read_once(
            module.strategy.all_reduce(self._operands.sums),
            torch.stack([split_gradient(count, self._tokens(module, name)) for name, count in counts.items()]),
            self._decayed,
            part_losses(module),
            torch.stack(states) if states else torch.empty(0, device=module.device),
        )
        by_name = dict(zip(map(curve_name, counts), gradients, strict=True))
        dead, alive = dead_and_alive(by_name, dict(zip(map(curve_name, rows), experts, strict=True)), *losses)
        shares = dict(zip((curve_name(weight.name) for weight in self._channels), decayed, strict=True))
        metrics = self._operands.metrics(operands) | gradient_metrics(by_name)
        metrics |= with_summary("weights/decayed_channels", shares, max)
        metrics["gradients/dead_weights"] = float(len(dead))
        return metrics, dead, alive

    def _reduced_counts(self, module: StageModule) -> dict[str, Tensor]:
        """Return what `count_gradient` found, of all ranks, by the name of each weight that has a gradient."""
        lengths = [count.shape[1] for count in self._counts.values()]
        reduced = module.strategy.all_reduce(torch.cat([*self._counts.values()], 1)).split(lengths, 1)
        return dict(zip(self._counts, reduced, strict=True))

    def _tokens(self, module: StageModule, name: str) -> Tensor | None:
        """Return int64 [E], the tokens that each expert of a stack got; None: it is no stack."""
        router = self._routers[name]
        return None if router is None or module.expert_counts is None else module.expert_counts[router]


def _print(line: str, trainer: Trainer) -> None:
    if trainer.is_global_zero:
        print(fold(line), flush=True)


def unseen_lines(schemes: Iterable[Scheme]) -> list[str]:
    """Return a line for each backend that does not show its operands."""
    counts = Counter(scheme.backend.name for scheme in schemes if not scheme.backend.shows_operands)
    return [
        f"quantization_health: {backend} shows no operands: no underflow, saturation and SNR of its {count} modules"
        for backend, count in counts.items()
    ]


def _read_once(*tensors: Tensor) -> list[Any]:
    """Return tensors as lists of their shapes, moved to the host together."""
    parts = torch.cat([tensor.double().flatten() for tensor in tensors]).cpu().split([t.numel() for t in tensors])
    return [part.view(tensor.shape).tolist() for part, tensor in zip(parts, tensors, strict=True)]
