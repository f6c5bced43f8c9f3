"""The C code in this folder: compiled once for this processor, when it is first asked for.

It replaces portable operations where a call costs more than its arithmetic, decoding on a CPU above all, and those that
pass over memory too often (`quantization`). Without a C compiler everything runs on the portable ones; `load` says why.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from modules.ops.native.library import load_library

SOURCE = Path(__file__).parent / "products.c"
COMPILE = ("-O3", "-ffast-math")
MOST_ROWS = 2048
"""Rows up to which these products beat the machine's library of large ones."""


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """Return (the library or None, "active" or the reason there is none)."""
    library, status = load_library(SOURCE, COMPILE)
    if library is not None:
        pointer, whole = ctypes.c_void_p, ctypes.c_int64
        library.superbolt_linear.argtypes = [pointer, whole, pointer, whole, whole, whole, whole, pointer]
        library.superbolt_linear.restype = None
        library.superbolt_largest.argtypes = [pointer, whole, whole, pointer]
        library.superbolt_largest.restype = None
    return library, status


def applies(x: Tensor, weight: Tensor) -> bool:
    """Return whether `few_rows_linear` takes these operands."""
    return (
        type(weight) is torch.nn.Parameter
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() <= MOST_ROWS * x.shape[-1]
        and weight.is_contiguous()
        and load()[0] is not None
    )


def few_rows_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return fp32 x W^T, rounded to bf16 where that is the dtype of the operands; see `applies`.

    Args:
        x: [..., I], fp32 or bf16.
        weight: [O, I], dtype of `x`.

    Returns:
        fp32 [..., O].
    """
    library, _ = load()
    assert library is not None
    wide = x.float().contiguous()
    out = torch.empty(*x.shape[:-1], len(weight))
    library.superbolt_linear(
        wide.data_ptr(),
        wide.numel() // wide.shape[-1],
        weight.data_ptr(),
        *weight.shape,
        weight.dtype == torch.bfloat16,
        torch.get_num_threads(),
        out.data_ptr(),
    )
    return out


def largest(scores: Tensor) -> Tensor:
    """Return int64 [...]: the place of the largest of each row of fp32 [..., N], the first of equals.

    torch's own takes a tenth of the time of a decoding step of 16 rows.
    """
    library, _ = load()
    if library is None or scores.device.type != "cpu" or scores.dtype != torch.float32 or not scores.is_contiguous():
        return scores.argmax(-1)
    out = torch.empty(scores.shape[:-1], dtype=torch.int64)
    library.superbolt_largest(scores.data_ptr(), out.numel(), scores.shape[-1], out.data_ptr())
    return out
