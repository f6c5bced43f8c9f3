"""Quantised products by torchao's training kernels, where chip and version have them.

FP8 (per tensor; gradients in E5M2) on NVIDIA GPUs from compute capability 8.9, MXFP8 and NVFP4 from 10.0. Plain linears
only. torchao's NVFP4 always rotates, rounds at random and has 16 x 16 scales, draws its random numbers from torch's
generator of the device, and takes sizes that are multiples of 128. On a CPU its FP8 and MXFP8 arithmetic is tested
against the emulated backend; its GPU kernels, those of NVFP4 above all, have not been run by this project.
"""

import functools
import importlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.ops.kernels import uncompiled
from modules.precision.devices import format_refusal
from modules.precision.formats import Format
from modules.precision.hadamard import SIGNS
from modules.precision.scheme import Arithmetic, Products, Scheme

_MULTIPLE: dict[Format, int] = {"fp8": 16, "mxfp8": 32, "nvfp4": 128}
"""What every size of a product is divisible by; rows are filled up with zeros."""


class TorchAO:
    """The backend.

    Args:
        emulate: let torchao emulate FP8 and MXFP8, on any device: for comparisons.
    """

    name = "torchao"
    shows_operands = False

    def __init__(self, emulate: bool = False) -> None:
        self._emulate = emulate

    def refusal(
        self,
        products: Products,
        arithmetic: Arithmetic,
        shape: torch.Size,
        device_type: str,
        capability: tuple[int, int] | None = None,
    ) -> str:
        """See `Backend`."""
        chosen = products.fprop
        if device_type != "cuda" or (capability is None and not torch.cuda.is_available()):
            return "no CUDA device"
        if products != Products.all_in(chosen):
            return "it computes all three products of a module in one format"
        if capability is None and importlib.util.find_spec("torchao") is None:
            return "torchao is not installed"
        if reason := format_refusal(chosen, capability or torch.cuda.get_device_capability()):
            return reason
        if len(shape) == 3:
            return "it computes no products of experts"
        if any(size % _MULTIPLE[chosen] for size in shape):
            return f"{chosen} needs sizes that are multiples of {_MULTIPLE[chosen]}, not {list(shape)}"
        if chosen == "nvfp4" and not arithmetic.complete:
            return "its NVFP4 always rotates, rounds gradients at random and has two-dimensional weight scales"
        return "" if capability else _failure(chosen)

    @uncompiled
    def linear(self, x: Tensor, weight: Tensor, scheme: Scheme) -> Tensor:
        """See `Backend`."""
        chosen, rows = scheme.products.fprop, x.flatten(0, -2)
        padded = F.pad(rows, (0, 0, 0, -len(rows) % _MULTIPLE[chosen]))
        if chosen == "fp8":
            out = _load("float8.float8_linear").matmul_with_hp_or_float8_args.apply(
                padded, weight.t(), *_fp8_settings(self._emulate)
            )
        elif chosen == "mxfp8":
            kernels = _load("quantization.quantize_.common.kernel_preference").KernelPreference
            scales = _load("prototype.mx_formats.config").ScaleCalculationMode
            preference = kernels.EMULATED if self._emulate else kernels.AUTO
            multiply = _load("prototype.moe_training.mxfp8_linear")._to_mxfp8_then_scaled_mm
            out = multiply(padded, weight, preference, scales.RCEIL)
        else:
            multiply = _load("prototype.moe_training.nvfp4_training.nvfp4_linear").nvfp4_linear
            out = multiply(padded, weight, sign_vector=SIGNS)
        return out[: len(rows)].reshape(*x.shape[:-1], len(weight)).clone()

    def grouped_linear(self, x: Tensor, weight: Tensor, offsets: Tensor, scheme: Scheme) -> Tensor:
        """Never called: `refusal` refuses experts."""
        raise NotImplementedError


def _load(module: str) -> Any:
    return importlib.import_module(f"torchao.{module}")


@functools.cache
def _failure(chosen: Format) -> str:
    """Return why the installed version lacks a format, or an empty text."""
    modules = {
        "fp8": "float8.float8_linear",
        "mxfp8": "prototype.moe_training.mxfp8_linear",
        "nvfp4": "prototype.moe_training.nvfp4_training.nvfp4_linear",
    }
    try:
        _load(modules[chosen])
    except Exception as error:  # of a foreign import: a reason, never an error
        return f"{type(error).__name__}: {error}"
    return ""


@functools.cache
def _fp8_settings(emulate: bool) -> tuple[Any, Any]:
    """Return (settings of the three products, of the casts): per tensor, as torchao has them by default."""
    config = _load("float8.config").Float8LinearConfig(emulate=emulate)
    tensors = _load("float8.float8_training_tensor")
    gemms = (config.gemm_config_output, config.gemm_config_grad_input, config.gemm_config_grad_weight)
    return tensors.LinearMMConfig(
        *[tensors.ScaledMMConfig(emulate, gemm.use_fast_accum, False, config.pad_inner_dim) for gemm in gemms]
    ), config
