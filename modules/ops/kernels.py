"""Which fast kernels this process can use. Detected at run time, never imported at module load.

Every operation in `ops` has a portable PyTorch version; a fast kernel only replaces it on CUDA tensors of 16 bits, when
its package imports. `kernel_table` says what is active and why not, so that nobody trains on a slow path unknowingly.
"""

import functools
import importlib
import inspect
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


_assumed: str | None = None


@contextmanager
def computing_on(kind: str) -> Iterator[None]:
    """Let operations choose for a while what they do on another kind of device, for tensors without values.

    Not thread-safe: a plain variable costs the operations nothing, and torch.compile reads it.
    """
    global _assumed
    before, _assumed = _assumed, kind
    try:
        yield
    finally:
        _assumed = before


def device_kind(tensor: Tensor) -> str:
    """Return what a tensor computes on, cpu or cuda."""
    return _assumed or tensor.device.type


@functools.cache
def cpu_multiplies_bf16() -> bool:
    """Return whether this CPU has instructions for bf16 products; else those of fp32 take a third of their time."""
    others = platform.machine() not in ("x86_64", "AMD64")
    return others or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def uncompiled(function: _Function) -> _Function:
    """Keep torch.compile out of a function: its graphs end before a call and go on after it."""
    return cast(_Function, torch.compiler.disable(function))


@functools.cache
def _import(module: str, attribute: str) -> tuple[Callable[..., Any] | None, str]:
    """Return (function or None, reason). Any failure of a foreign import is a reason, never an error."""
    try:
        return uncompiled(getattr(importlib.import_module(module), attribute)), "active"
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _load(module: str, attribute: str) -> tuple[Callable[..., Any] | None, str]:
    """Return what `_import` does for a kernel that can run: torch's own also on tensors without values."""
    if _assumed is None and not torch.cuda.is_available():
        return None, "no CUDA device"
    if _assumed is not None and not module.startswith("torch."):
        return None, "needs values"
    return _import(module, attribute)


def ssd_kernel(x: Tensor) -> Callable[..., Any] | None:
    """Return mamba-ssm's Triton `mamba_chunk_scan_combined`, or None where it cannot run on `x`."""
    return _load("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")[0] if _fits(x) else None


def varlen_attention_kernel(query: Tensor) -> Callable[..., Any] | None:
    """Return torch's `varlen_attn`, or None where it cannot run on `query` [..., P]."""
    fits = _fits(query) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256  # what flash attention takes
    return _load("torch.nn.attention.varlen", "varlen_attn")[0] if fits else None


@functools.cache
def takes_argument(kernel: Callable[..., Any], name: str) -> bool:
    """Return whether a kernel has an argument that only newer versions of its package know."""
    return name in inspect.signature(kernel).parameters


def _fits(x: Tensor) -> bool:
    """Not fp32: attention kernels refuse it, and the products inside Triton's scan would be TF32."""
    return device_kind(x) == "cuda" and x.dtype in (torch.bfloat16, torch.float16)


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
