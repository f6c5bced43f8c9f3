"""The C code in this folder: compiled once for this processor, when it is first asked for.

It replaces portable operations where a call costs more than its arithmetic, decoding on a CPU above all, and those that
pass over memory too often (`quantization`). Without a C compiler everything runs on the portable ones; `load` says why.
"""

import ctypes
import functools
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from modules.ops.native import quantization
from modules.ops.native.library import load_library

SOURCE = Path(__file__).parent / "products.c"
COMPILE = ("-O3", "-ffast-math")
MOST_ROWS = 2048
"""Rows up to which these products beat the machine's library of large ones."""
FORMATS = ("nvfp4", "fp8")
"""Formats that inputs are rounded to, in the order of quantization.c."""


class Rounding(ctypes.Structure):
    """`rounding` of products.h: nothing, or to one of `FORMATS`."""

    _fields_ = (("function", ctypes.c_void_p), ("format", ctypes.c_int64), ("inverse_scales", ctypes.c_void_p))

    @classmethod
    def to(cls, format: Literal["nvfp4", "fp8"], inverse_scales: Tensor) -> "Rounding":
        """Return the rounding to a format with S, contiguous fp32 [E], which the caller keeps."""
        library, reason = quantization.load()
        assert library is not None, reason
        function = ctypes.cast(library.superbolt_operand, ctypes.c_void_p)
        return cls(function, FORMATS.index(format), inverse_scales.data_ptr())


class LinearArguments(ctypes.Structure):
    """`linear` of products.h."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("out_features", "in_features", "bf16", "cast")),
        ("inputs", Rounding),
        ("factors", ctypes.c_void_p),
        ("adapter", ctypes.c_void_p),
        ("scale", ctypes.c_float),
    )


class Operands(NamedTuple):
    """What a product does besides multiplying; the tensors are contiguous fp32 [E], E = 1 without experts."""

    format: Literal["nvfp4", "fp8"] | None = None
    """That inputs are rounded to; None: they stay as they are."""
    inverse_scales: Tensor | None = None
    """S of the inputs, in a format."""
    factors: Tensor | None = None
    """What results are multiplied by before they are rounded to the compute dtype; None: nothing."""


PLAIN = Operands()


def describe_linear(weight: Tensor, operands: Operands = PLAIN, source: torch.dtype | None = None) -> LinearArguments:
    """Return a product as the C code knows it; the caller keeps the tensors.

    Args:
        weight: contiguous [O, I] or, of experts, [E, O, I], in the dtype of inputs and results.
        operands: what is done besides.
        source: dtype that inputs come in, fp32 or bf16; None: that of the weight.
    """
    bf16, factors = weight.dtype == torch.bfloat16, operands.factors
    described = LinearArguments(
        weight.data_ptr(),
        *weight.shape[-2:],
        bf16=bf16,
        cast=bf16 and source == torch.float32,
        factors=None if factors is None else factors.data_ptr(),
    )
    if operands.format is not None:
        assert operands.inverse_scales is not None
        described.inputs = Rounding.to(operands.format, operands.inverse_scales)
    return described


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """Return (the library or None, "active" or the reason there is none)."""
    library, status = load_library(SOURCE, COMPILE)
    if library is not None and quantization.load()[0] is None:
        return None, quantization.load()[1]
    if library is not None:
        pointer, whole = ctypes.c_void_p, ctypes.c_int64
        library.superbolt_linear.argtypes = [pointer, whole, pointer, whole, pointer]
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


def few_rows_linear(x: Tensor, weight: Tensor, operands: Operands = PLAIN) -> Tensor:
    """Return fp32 x W^T, rounded to bf16 where that is the dtype of the operands; see `applies`.

    Args:
        x: [..., I], fp32 or bf16.
        weight: [O, I], dtype of `x`.
        operands: what is done besides.

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
        ctypes.byref(describe_linear(weight, operands)),
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
