"""The sides that the NVFP4 benchmarks compare, and how each process becomes one."""

import os
import tempfile
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.__main__ import settle_process
from benchmarks.side import timed
from modules.ops.native import quantization
from modules.ops.native.library import load_library

OURS, PORTABLE, TORCHAO, COMPILED = "ours", "ours, portable", "torchao", "torchao, compiled"
PLAIN = "unquantised"
SIDES = [OURS, PORTABLE, TORCHAO, COMPILED, PLAIN]
"""With our C code; in torch alone, as where there is no compiler; torchao, eager and by torch.compile; the floor."""


def enter(side: str, threads: int) -> None:
    """Make this process one of a side: all have our settings of memory, and so many threads."""
    settle_process()
    torch.set_num_threads(threads)
    if side == PORTABLE:
        quantization.applies = lambda x: False
    elif side == COMPILED:
        torch.compiler.config.force_disable_caches = True  # what an earlier run compiled would hide the time it takes


def compilation_seconds() -> float:
    """Return the seconds that our C code takes to compile where no cache has it."""
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, XDG_CACHE_HOME=cache):
        return timed(lambda: load_library(quantization.SOURCE, quantization.COMPILE))[1]


def torchao_leaves(x: Tensor) -> Tensor:
    """Return what torchao leaves of a matrix."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    scale = per_tensor_amax_to_scale(x.abs().max())
    return NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(x.dtype)


def torchao_linear(weight: Tensor) -> nn.Linear:
    """Return torchao's layer of quantisation-aware training.

    Its forward product is one of NVIDIA's Blackwell chips only. Here it multiplies what is left of both operands in
    their dtype instead, as its backward pass does everywhere.
    """
    import torchao.prototype.qat.nvfp4 as qat

    def multiply(a: Any, b: Any, operation: object, bias: Tensor | None = None) -> Tensor:
        return F.linear(a.dequantize(a.orig_dtype), b.t().dequantize(a.orig_dtype), bias)

    qat._addmm_nvfp4_dispatch = multiply
    config = qat.NVFP4FakeQuantizeConfig()
    layer = qat.NVFP4FakeQuantizedLinear(
        weight.shape[1], weight.shape[0], activation_config=config, weight_config=config, dtype=weight.dtype
    )
    layer.weight = nn.Parameter(weight)
    return layer
