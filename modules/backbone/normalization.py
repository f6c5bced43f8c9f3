"""RMSNorm and the gated group RMSNorm of Mamba-2, computed in fp32."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


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


class GatedGroupRMSNorm(RMSNorm):
    """RMSNorm of `x * silu(gate)` within groups of channels (norm_before_gate = False in mamba-ssm's terms).

    Args:
        size: channels, a multiple of `groups`.
        groups: groups normalised separately.
        epsilon: added to the mean square.
    """

    def __init__(self, size: int, groups: int, epsilon: float) -> None:
        super().__init__(size, epsilon)
        self.groups = groups

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Normalise [..., size] gated by [..., size]; returns the dtype of `x`."""
        return _GatedNorm.apply(x, gate, self.weight, self.groups, self.epsilon)


class _GatedNorm(Function):
    """Keeps its inputs and computes the rest again: half the passes of automatic differentiation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, groups: int, epsilon: float) -> Tensor:
        gated = F.silu(gate.float()).mul_(x).unflatten(-1, (groups, -1))
        scale = torch.linalg.vector_norm(gated, dim=-1, keepdim=True).square_().div_(gated.shape[-1])
        scale.add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, gate, weight, scale)
        ctx.groups, ctx.dtype = groups, x.dtype
        return gated.mul_(scale).flatten(-2).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        grad: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, gate, weight, scale = ctx.saved_tensors
        x, gate, grad = x.float(), gate.float(), grad.float()
        activated = F.silu(gate)
        normed = torch.mul(activated, x).unflatten(-1, (ctx.groups, -1)).mul_(scale)
        grad_weight = (grad * normed.flatten(-2)).flatten(0, -2).sum(0)
        # d/du of u r(u): r (g - normed mean(g normed))
        grad = (grad * weight).unflatten(-1, (ctx.groups, -1))
        mean = (grad * normed).mean(-1, keepdim=True)
        grad = grad.addcmul_(normed, mean, value=-1).mul_(scale).flatten(-2)
        grad_gate = torch.ops.aten.silu_backward(grad * x, gate)
        return grad.mul_(activated).to(ctx.dtype), grad_gate.to(ctx.dtype), grad_weight, None, None
