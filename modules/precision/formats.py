"""The number formats a matrix product can run in, and what the scaled ones share."""

from typing import Literal

import torch
from torch import Tensor

from modules.errors import UserError

Format = Literal["fp32", "bf16", "fp8", "mxfp8", "nvfp4"]
"""Name of a format, as written in a precision recipe."""

QUANTIZED: tuple[Format, ...] = ("fp8", "mxfp8", "nvfp4")
"""Formats whose operands are rounded to few bits, with scales, on the way into a product."""

COMPUTE_DTYPE: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    **dict.fromkeys(QUANTIZED, torch.bfloat16),
}
"""Dtype of a module's operands before they are quantised, of its results, and its weights are gathered in."""


def tensor_amax(x: Tensor, stacked: bool = False) -> Tensor:
    """Return the largest magnitude as fp32: a scalar, or [E] for each leading index.

    NaN where there is a NaN, 0 where there is nothing.
    """
    if not x.numel():
        return torch.zeros(x.shape[:1] if stacked else (), device=x.device)
    if stacked:
        return x.detach().flatten(1).abs().amax(1).float()  # `aminmax` along an axis takes four times as long on a CPU
    low, high = torch.aminmax(x.detach())
    return torch.maximum(-low, high).float()


def broadcast_scale(scale: Tensor, dimensions: int) -> Tensor:
    """Return a scale of some leading axes as a view that broadcasts with a tensor of `dimensions` axes."""
    return scale.reshape(scale.shape + (1,) * (dimensions - scale.ndim))


def check_blocks(length: int, block: int, name: str) -> None:
    """Raise a UserError unless an axis consists of whole blocks."""
    if length % block:
        raise UserError(
            f"{name} needs a length divisible by {block} along its blocks, not {length}; take another format"
        )
