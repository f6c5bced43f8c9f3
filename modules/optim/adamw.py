"""AdamW whose step can be skipped on the device, and the parameter groups it is used with."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modules.backbone.initialization import local_part
from modules.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings of AdamW (arXiv 1711.05101).

    Raises:
        UserError: if a field is out of range.
    """

    learning_rate: float
    """Peak learning rate; > 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moment, each in [0, 1)."""
    epsilon: float = 1e-8
    """Added to the root of the second moment; > 0."""
    weight_decay: float = 0.1
    """Decoupled decay per step, times the learning rate; >= 0. Norms, biases, A_log, D and dt_bias have none."""
    gradient_clip_norm: float | None = 1.0
    """Bound on the global gradient norm; > 0, or null for none."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"model.optimizer.learning_rate: {self.learning_rate} must be positive and finite")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"model.optimizer.betas: {self.betas} must lie in [0, 1)")
        if not self.epsilon > 0:
            raise UserError(f"model.optimizer.epsilon: {self.epsilon} must be positive")
        if not self.weight_decay >= 0:
            raise UserError(f"model.optimizer.weight_decay: {self.weight_decay} must not be negative")
        if self.gradient_clip_norm is not None and not self.gradient_clip_norm > 0:
            raise UserError(f"model.optimizer.gradient_clip_norm: {self.gradient_clip_norm} must be positive or null")


class AdamW(torch.optim.AdamW):
    """Fused AdamW on the local shards of DTensors.

    Set `found_inf` (fp32 scalar, 1 = skip) before `step` to leave parameters, moments and step counts as they are
    without asking the host. The fused kernel takes no mix of DTensors and plain tensors, hence the local shards; its
    arithmetic is elementwise, so the result is the same.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: Iterable[dict[str, Any]], config: OptimizerConfig) -> None:
        super().__init__(groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True)

    def _init_group(
        self,
        group: dict[str, Any],
        params_with_grad: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        state_steps: list[Tensor],
    ) -> bool:
        lists = (params_with_grad, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = map(local_part, tensors)
        return has_complex


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split what trains into parameters with weight decay and those without (norms, biases, `A_log`, `D`, `dt_bias`).

    Args:
        network: the network.
        weight_decay: decay of the first group.

    Returns:
        Two parameter groups.
    """
    decayed, free = [], []
    for parameter in filter(lambda parameter: parameter.requires_grad, network.parameters()):
        (free if parameter.ndim < 2 else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
