"""Which fast kernels this process can use. Detected at run time, never imported at module load.

Every operation in `ops` has a portable PyTorch version; a fast kernel only replaces it on CUDA tensors, when its
package imports. `kernel_table` says what is active and why not, so that nobody trains on a slow path unknowingly.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def _load(module: str, attribute: str) -> tuple[Callable[..., Any] | None, str]:
    """Return (function or None, reason). Any failure of a foreign import is a reason, never an error."""
    if not torch.cuda.is_available():
        return None, "no CUDA device"
    try:
        return getattr(importlib.import_module(module), attribute), "active"
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def ssd_kernel() -> Callable[..., Any] | None:
    """Return mamba-ssm's Triton `mamba_chunk_scan_combined`, or None where it cannot run."""
    return _load("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")[0]


def varlen_attention_kernel() -> Callable[..., Any] | None:
    """Return torch's `varlen_attn`, or None where it cannot run."""
    return _load("torch.nn.attention.varlen", "varlen_attn")[0]


def kernel_table() -> list[tuple[str, str, str]]:
    """Return a row (operation, fast kernel, "active" or the reason it is not) per operation with a fast kernel."""
    return [
        (
            "SSD scan",
            "mamba-ssm Triton",
            _load("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")[1],
        ),
        ("packed attention", "torch varlen_attn", _load("torch.nn.attention.varlen", "varlen_attn")[1]),
    ]
