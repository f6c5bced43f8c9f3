"""The router of DeepSeek-V3 (arXiv 2412.19437): fp32 sigmoid scores, a selection-only bias, group limits.

The bias steers which experts are chosen and never what they weigh. It is an fp32 buffer: it grows to about 2^6 while
its differences stay below 2^-2, which bf16 cannot hold.
Shapes: B rows, T positions, D hidden, E experts, K top-k.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.backbone.config import BackboneConfig

_GROUP_SCORE_EXPERTS = 2
"""A group is scored by the sum of its best two experts."""


class Routing(NamedTuple):
    """What one mixture layer did with its tokens; returned by the forward pass, never kept in module state."""

    probabilities: Tensor
    """fp32 [B, T, E]: scores divided by their sum over experts; differentiable."""
    counts: Tensor
    """int64 [B, E]: tokens of each row sent to each expert."""


class Router(nn.Module):
    """Choose K experts for each token.

    Args:
        config: the backbone's configuration.
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.top_k, self.scaling_factor = config.num_experts_per_tok, config.routed_scaling_factor
        self.groups, self.top_groups = config.n_group, config.topk_group
        self.normalize = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.active = self.weight.numel()
        """Number of weights that a token is multiplied by."""
        self.register_buffer(
            "e_score_correction_bias",
            torch.empty(config.n_routed_experts, dtype=torch.float32, device=self.weight.device),
        )

    def forward(self, x: Tensor, routed: bool = True) -> tuple[Tensor, Tensor, Routing | None]:
        """Route [B, T, D].

        Returns:
            (weights fp32 [B, T, K], expert ids int64 [B, T, K], `Routing`, or None unless `routed`).
        """
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        choice = self._limit_groups(scores.detach() + self.e_score_correction_bias)
        experts = choice.topk(self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(-1, experts)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * self.scaling_factor
        if not routed:
            return weights, experts, None
        flat = experts.flatten(1)
        counts = torch.zeros(*flat.shape[:1], scores.shape[-1], dtype=torch.int64, device=x.device)
        counts.scatter_add_(1, flat, torch.ones_like(flat))
        routing = Routing(scores / (scores.sum(-1, keepdim=True) + 1e-20), counts)
        return weights, experts, routing

    def _limit_groups(self, choice: Tensor) -> Tensor:
        """Set the scores of all but the best groups to -inf."""
        if self.top_groups == self.groups:
            return choice
        grouped = choice.unflatten(-1, (self.groups, -1))
        best = grouped.topk(min(_GROUP_SCORE_EXPERTS, grouped.shape[-1]), dim=-1).values.sum(-1)
        allowed = torch.zeros_like(best, dtype=torch.bool)
        allowed.scatter_(-1, best.topk(self.top_groups, dim=-1).indices, True)
        return grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(-2)
