"""The dense MLP with squared ReLU, used as a layer and as the shared expert."""

import torch.nn.functional as F
from torch import Tensor, nn

from modules.precision.linear import Linear


def squared_relu(x: Tensor) -> Tensor:
    """Return relu(x) ** 2 in the dtype of `x`."""
    return F.relu(x).square()


class MLP(nn.Module):
    """`down(relu(up(x)) ** 2)`.

    Args:
        hidden_size: D.
        intermediate_size: hidden width.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        return self.down_proj(squared_relu(self.up_proj(x)))
