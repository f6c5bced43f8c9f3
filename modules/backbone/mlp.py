"""The dense MLP with squared ReLU, used as a layer and as the shared expert."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from modules.backbone.mixer import Mixer
from modules.precision.linear import Linear


def squared_relu(x: Tensor) -> Tensor:
    """Return relu(x) ** 2 in the dtype of `x`."""
    return _SquaredReLU.apply(x)


class _SquaredReLU(Function):
    """Keeps one tensor and passes over it twice; differentiated automatically it is two and five times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        grad: Tensor,
    ) -> Tensor:
        (positive,) = ctx.saved_tensors
        return torch.mul(grad, positive).mul_(2)


class MLP(Mixer):
    """`down(relu(up(x)) ** 2)`.

    Args:
        hidden_size: D.
        intermediate_size: hidden width.
    """

    PARTS: ClassVar = dict.fromkeys(("up_proj", "down_proj"), "MLP")

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)
        self.down_proj.writes_residual = True

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        return self.down_proj(squared_relu(self.up_proj(x)))
