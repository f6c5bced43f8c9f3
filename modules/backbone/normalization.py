"""RMSNorm and the gated group RMSNorm of Mamba-2, computed in fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Divide by the root mean square of the last dimension and multiply by a weight, in fp32.

    Args:
        size: channels D.
        epsilon: added to the mean square.
    """

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., D]; returns the dtype of `x`."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.epsilon).to(x.dtype)


class GatedGroupRMSNorm(nn.Module):
    """RMSNorm of `x * silu(gate)` within groups of channels (norm_before_gate = False in mamba-ssm's terms).

    Args:
        size: channels, a multiple of `groups`.
        groups: groups normalised separately.
        epsilon: added to the mean square.
    """

    def __init__(self, size: int, groups: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.groups = groups
        self.epsilon = epsilon

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Normalise [..., size] gated by [..., size]; returns the dtype of `x`."""
        gated = (x.float() * F.silu(gate.float())).unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.epsilon).flatten(-2)
        return (normed * self.weight).to(x.dtype)
