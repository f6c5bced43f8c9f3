"""The number formats a matrix product can run in."""

from typing import Literal

import torch

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
