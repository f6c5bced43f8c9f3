"""Quantisers in C (quantization.c): one pass over memory where the portable operations make thirty.

Bit for bit what the portable ones in `modules/precision` compute, which take these wherever `applies` allows.
"""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from modules.ops.kernels import device_kind
from modules.ops.native.library import load_library

SOURCE = Path(__file__).parent / "quantization.c"
COMPILE = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
BLOCK = 16
E4M3_MAX = 448.0
FOUR_OVER_SIX_MAX = 256.0
"""Largest block scale that S is made for with four-over-six: 1.5 times it is still an E4M3 number."""
CHOICES = ("maximum", "mse", "mae", "search", "given")
"""How a block comes to its scale, in the order of quantization.c."""
_NOTHING = torch.empty(0)
"""Its address is 0."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2, None: 3}
"""What is written for every number: what it stands for, in a dtype, or its code (uint8), or nothing."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to quantise to NVFP4, in C and in portable torch (`modules/precision/nvfp4.py`, where S is explained)."""

    amax: Tensor | None = None
    """fp32 largest magnitude (of the rotated tensor with `hadamard`): a scalar, or of the shape of leading axes of the
    tensor (per expert, per row; not of R where axis is -2). None: taken from the tensor."""
    inverse_scale: Tensor | None = None
    """fp32 S itself instead of that of `amax`, of a shape that `amax` may have."""
    stacked: bool = False
    """Without `amax`, take one for each leading index ([E, O, I]: per expert)."""
    tiles: bool = False
    """One scale for each 16x16 tile of the last two axes instead of each 16 numbers; rows that fill no whole tile make
    a smaller one. Then quantising and transposing may be exchanged."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """To the nearest (ties to even), or unbiased with random bits of `generator`."""
    generator: torch.Generator | None = None
    """On the device of the tensor; None: torch's global one."""
    four_over_six: Literal["mse", "mae"] | None = None
    """Map a block's (tile's) largest magnitude onto 4 instead of 6 where that makes the sum of squared, or absolute,
    errors smaller."""
    scales: Tensor | None = None
    """float8_e4m3fn [..., K/16] to take instead of those of the maxima."""
    axis: int = -1
    """Along which blocks lie: -1 (K), or -2 (R), as in the transposed tensor. `nvfp4.quantize` then returns the
    transposed tensor; values are laid out as the tensor is, either way."""
    hadamard: bool = False
    """Rotate every 16 numbers along the axis first (`hadamard.rotate`); they stay rotated."""

    @property
    def bound(self) -> float:
        """Largest block scale that S is made for."""
        return FOUR_OVER_SIX_MAX if self.four_over_six else E4M3_MAX


class Job(ctypes.Structure):
    """`job` of quantization.c."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("bf16", "matrices", "rows", "columns")),
        *((name, ctypes.c_int64) for name in ("along_rows", "hadamard", "tiles", "choice")),
        ("denominator", ctypes.c_float),
        ("rows_per_scale", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("inverse_scale", "amax", "bits", "given", "out")),
        *((name, ctypes.c_int64) for name in ("kind", "unscaled")),
        ("scales", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
    )


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """Return (the library or None, "active" or the reason there is none)."""
    library, status = load_library(SOURCE, COMPILE)
    if library is not None:
        for function in ("quantize", "rotate", "mxfp8"):
            getattr(library, f"superbolt_{function}").argtypes = [ctypes.c_void_p]
        library.superbolt_amax.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        library.superbolt_fp8.argtypes = [ctypes.c_void_p, ctypes.c_float]
        whole = ctypes.c_int64
        library.superbolt_operand.argtypes = [ctypes.c_void_p, whole, whole, ctypes.c_float, whole, ctypes.c_void_p]
        for function in ("quantize", "rotate", "mxfp8", "amax", "fp8", "operand"):
            getattr(library, f"superbolt_{function}").restype = None
    return library, status


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None or isinstance(tensor, FakeTensor) else tensor.data_ptr()


def _call(function: str, x: Tensor, job: Job, *arguments: float | None) -> None:
    """Call a function of the library; of tensors without values, which have shapes alone, nothing is to be written."""
    if not isinstance(x, FakeTensor):
        library, _ = load()
        getattr(library, f"superbolt_{function}")(ctypes.byref(job), *arguments)


def applies(x: Tensor) -> bool:
    """Return whether the functions below take this tensor."""
    return (
        type(x) in (Tensor, torch.nn.Parameter, FakeTensor)
        and device_kind(x) == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.ndim > 0
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and load()[0] is not None
    )


def _job(x: Tensor, axis: int, hadamard: bool) -> Job:
    """Return a job that says where the numbers of contiguous `x` lie."""
    rows = x.shape[-2] if x.ndim > 1 else 1
    return Job(
        x=_address(x),
        bf16=x.dtype == torch.bfloat16,
        matrices=x.numel() // (rows * x.shape[-1]),
        rows=rows,
        columns=x.shape[-1],
        along_rows=axis == -2,
        hadamard=hadamard,
        threads=torch.get_num_threads(),
    )


def amax(x: Tensor, *, axis: int = -1, hadamard: bool = False, stacked: bool = False) -> Tensor:
    """Return the largest magnitude, after the Hadamard transform where that is asked for; NaN where there is one.

    Args:
        x: [..., R, K], fp32 or bf16.
        axis: -1 or -2, of the transform.
        hadamard: whether to transform.
        stacked: one for each leading index.

    Returns:
        fp32 scalar, or [E].
    """
    x = x.detach().contiguous()
    job = _job(x, axis, hadamard)
    strips = torch.empty(job.matrices, (job.rows + BLOCK - 1) // BLOCK)
    _call("amax", x, job, _address(strips))
    return strips.view(len(x), -1).amax(1) if stacked else strips.amax()


def quantize(
    x: Tensor,
    options: Options,
    inverse_scale: Tensor,
    largest: Tensor,
    bits: Tensor | None,
    *,
    kind: torch.dtype | None,
    search: bool = False,
    unscaled: bool = False,
    keep_scales: bool = False,
) -> tuple[Tensor, Tensor]:
    """Round a tensor to NVFP4.

    Args:
        x: [..., R, K], fp32 or bf16.
        options: of them the layout, and how a block comes to its scale.
        inverse_scale: fp32 S, a scalar or of the shape of leading axes of `x` (not of R where the axis is -2).
        largest: fp32 largest magnitude that S belongs to, like `inverse_scale`.
        bits: uint8 like `x`: round stochastically; None: to the nearest.
        kind: what to return of every number, see KINDS.
        search: take the block scales with the smallest squared errors.
        unscaled: leave S out of the numbers returned.
        keep_scales: return the scales.

    Returns:
        (numbers or codes laid out as `x`; fp32 scales [..., R, K/16], or [..., K, R/16] where the axis is -2): empty
        where they were not asked for.
    """
    x = x.detach().contiguous()
    inverse_scale, largest = inverse_scale.contiguous(), largest.expand_as(inverse_scale).contiguous()
    job = _job(x, options.axis, options.hadamard)
    out = _NOTHING if kind is None else torch.empty_like(x, dtype=kind)
    blocks, lanes = (job.rows, job.columns) if options.axis == -2 else (job.columns, job.rows)
    leading = (*x.shape[:-2], lanes) if x.ndim > 1 else ()
    scales = torch.empty(*leading, blocks // BLOCK) if keep_scales else _NOTHING
    bits = None if bits is None else bits.contiguous()
    given = None if options.scales is None else options.scales.float().contiguous()
    choice = "search" if search else "given" if given is not None else options.four_over_six or "maximum"
    job.inverse_scale, job.amax = _address(inverse_scale), _address(largest)
    job.rows_per_scale = job.matrices * job.rows // inverse_scale.numel()
    job.tiles, job.choice, job.denominator = options.tiles, CHOICES.index(choice), 6 * options.bound
    job.kind, job.unscaled = KINDS[kind], unscaled
    job.out, job.scales = _address(out), _address(scales)
    job.bits = _address(bits)
    job.given = _address(given)
    _call("quantize", x, job)
    return out, scales


def _map(function: str, x: Tensor, axis: int, hadamard: bool) -> Tensor:
    """Return what a function of the library makes of a tensor, in its dtype."""
    x = x.detach().contiguous()
    out = torch.empty_like(x)
    job = _job(x, axis, hadamard)
    job.out, job.kind = _address(out), KINDS[x.dtype]
    _call(function, x, job)
    return out


def rotate(x: Tensor, axis: int = -1) -> Tensor:
    """Return the random Hadamard transform of a tensor, in its dtype.

    Args:
        x: [..., R, K], fp32 or bf16.
        axis: along which blocks of 16 lie: -1 or -2.
    """
    return _map("rotate", x, axis, hadamard=True)


def mxfp8(x: Tensor, axis: int = -1) -> Tensor:
    """Return what MXFP8 leaves of a tensor, in its dtype.

    Args:
        x: [..., R, K], fp32 or bf16.
        axis: along which blocks of 32 lie: -1 or -2.
    """
    return _map("mxfp8", x, axis, hadamard=False)


def fp8(x: Tensor, inverse_scale: Tensor, dtype: torch.dtype, unscaled: bool = False) -> Tensor:
    """Return what FP8 leaves of a tensor, in its dtype.

    Args:
        x: [..., R, K], fp32 or bf16.
        inverse_scale: fp32 S, a scalar or of the shape of leading axes of `x`.
        dtype: float8_e4m3fn or float8_e5m2.
        unscaled: return the numbers of FP8 themselves instead, in bf16, which holds them exactly.
    """
    x, inverse_scale = x.detach().contiguous(), inverse_scale.contiguous()
    out = torch.empty_like(x, dtype=torch.bfloat16 if unscaled else None)
    job = _job(x, -2, hadamard=False)
    job.out, job.kind, job.unscaled = _address(out), KINDS[out.dtype], unscaled
    job.inverse_scale = _address(inverse_scale)
    job.rows_per_scale = job.matrices * job.rows // inverse_scale.numel()
    _call("fp8", x, job, torch.finfo(dtype).max)
    return out
