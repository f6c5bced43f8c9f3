"""The number formats a matrix product can run in."""

from typing import Literal

import torch

Format = Literal["fp32", "bf16"]
"""Name of a format, as written in a precision recipe."""

COMPUTE_DTYPE: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Dtype the operands of a matrix product are cast to, and its weights are gathered in."""
