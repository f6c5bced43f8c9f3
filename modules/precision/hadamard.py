"""The 16x16 random Hadamard transform that NVFP4 training applies to both operands of the weight gradient.

It spreads an outlier over the 16 tokens of its block. Both operands are turned by the same orthogonal matrix along the
axis their product sums over, so the product stays what it was. One sign vector serves all layers and the whole run,
the one of Transformer Engine. On a CPU `modules/ops/native/quantization.c` does the work where it can be compiled, with
the same bits.
"""

import torch
from torch import Tensor

from modules.ops.native import quantization as native

BLOCK = 16
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""The fixed random signs s."""


def rotate(x: Tensor, axis: int = -1) -> Tensor:
    """Multiply every 16 numbers along an axis by diag(s) H / 4, with Sylvester's H, from the right.

    Sums are fp32, in the order of the fast transform, and the result is rounded to the dtype of `x` (bf16 as a rule, as
    the hardware path does before it quantises).

    Args:
        x: any floating dtype, length of the axis divisible by 16.
        axis: -1 or -2.

    Returns:
        Like `x`.
    """
    if native.applies(x):
        return native.rotate(x, axis)
    signs = torch.tensor(SIGNS, dtype=torch.float32, device=x.device)
    sums = x.float().unflatten(axis, (-1, BLOCK)) * (signs if axis == -1 else signs.unsqueeze(1))
    for half in (1, 2, 4, 8):
        pairs = sums.unflatten(axis, (-1, 2, half))
        first, second = pairs.unbind(axis - 1)
        sums = torch.stack((first + second, first - second), axis - 1).flatten(axis - 2, axis)
    return (sums * 0.25).flatten(axis - 1, axis).to(x.dtype)
