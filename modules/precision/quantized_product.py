"""Linear layers as an inference engine runs them: a checkpoint's quantised weight, inputs quantised on the way in.

The scale of the inputs is the checkpoint's, found by calibration, so what lies beyond the largest input it was found
for saturates, as it does in the engines; block scales of NVFP4 inputs are found anew in each call. Weight-only layers
take bf16 inputs. Products are those of the emulated backend: numbers times block scales, exact in bf16, multiplied with
fp32 sums, and the scales of both tensors applied once, behind the sum. The weight is frozen; adapters beside it are
trained with the gradient of the inputs, that of the dequantised weight, straight through the rounding of the inputs.

NVIDIA GPUs from compute capability 8.9 on multiply FP8 themselves: a plain linear with sizes that are multiples of 16
then keeps its codes and takes torch's `scaled_mm`, whose terms are the same. This project has run it on a CPU alone.
NVFP4, experts and weight-only layers are emulated everywhere. The C code of a CPU (`modules.ops.native`) does the same
from the same memory for a few rows at a time: two bytes a weight, whatever the format has on the disk.
Shapes: R rows, E experts, I in-features, O out-features.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from modules.ops import native
from modules.ops.experts import multiply_rows, row_experts
from modules.ops.kernels import device_kind
from modules.ops.scaled import multiply
from modules.precision import fp8, nvfp4
from modules.precision.linear import GroupedLinear, Linear
from modules.precision.quantized import QuantizedWeight, WeightFormat, gemm_values

_MULTIPLE = 16
"""What both sizes of an FP8 weight are divisible by where the device multiplies it."""


class QuantizedProduct:
    """Multiplies bf16 inputs by the quantised weight that the module holds: bf16 `gemm_values`, or codes of FP8.

    Args:
        format: of the weight, and of the inputs where they are quantised.
        scales: fp32 [E] of the weight (E = 1 in a `Linear`), on its device.
        input_scales: fp32 [E] of the inputs; None: they stay bf16.
    """

    def __init__(self, format: WeightFormat, scales: Tensor, input_scales: Tensor | None) -> None:
        self._format: WeightFormat = format
        self._weight_scales = self._scales = scales
        self._inverse_scale: Tensor | None = None  # S of all inputs, or [E]
        if input_scales is not None:
            self._scales = scales * input_scales
            alike = bool((input_scales == input_scales[0]).all())
            self._inverse_scale = (input_scales[0] if alike else input_scales).reciprocal()
        self._factor = float(self._scales[0])
        inverse_scales = None if input_scales is None else input_scales.reciprocal()
        self.operands = native.Operands(None if input_scales is None else format, inverse_scales, self._scales)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `Product`."""
        return _StraightThrough.apply(x, weight, None, self)

    def grouped_linear(self, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """See `Product`."""
        return _StraightThrough.apply(x, weight, offsets, self)

    def results(self, x: Tensor, weight: Tensor, offsets: Tensor | None) -> Tensor:
        """Return what `linear` or, with end rows, `grouped_linear` does, without autograd; no view."""
        inverse_scale = self._inverse_scale
        if offsets is not None:
            if inverse_scale is not None and inverse_scale.ndim:
                inverse_scale = inverse_scale[row_experts(len(x), offsets)]
            return multiply_rows(self._round(x, inverse_scale), weight.transpose(1, 2), offsets, self._scales)
        rows = self._round(x.reshape(-1, x.shape[-1]), inverse_scale)
        if weight.dtype == torch.float8_e4m3fn and len(rows) and len(weight) % _MULTIPLE == 0:
            out = self._multiply_codes(rows, weight)
        else:
            out = multiply(rows, weight.bfloat16().T, self._factor)
        return torch.ops.aten._unsafe_view(out, [*x.shape[:-1], len(weight)])

    def input_gradient(self, grad: Tensor, weight: Tensor, offsets: Tensor | None) -> Tensor:
        """Return the gradient of the inputs for bf16 `grad` of the results: its product with the dequantised weight."""
        if offsets is not None:
            return multiply_rows(grad.contiguous(), weight, offsets, self._weight_scales)
        rows = multiply(grad.flatten(0, -2), weight.bfloat16(), self._weight_scales[0])
        return rows.view(*grad.shape[:-1], weight.shape[1])

    def _multiply_codes(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Map rounded rows [R, I] by codes [O, I] to bf16 [R, O]."""
        codes, one, kind = rows.to(weight.dtype), torch.ones_like(self._scales), F.ScalingType.TensorWise
        return F.scaled_mm(codes, weight.T, self._scales, kind, one, kind, output_dtype=torch.bfloat16)

    def _round(self, x: Tensor, inverse_scale: Tensor | None) -> Tensor:
        """Return inputs [R, I] times S, rounded: bf16, exact; as they are in a weight-only layer."""
        if inverse_scale is None:
            return x
        if self._format == "fp8":
            return fp8.gemm_operand(x, inverse_scale)[0]
        return nvfp4.gemm_operand(x, nvfp4.Options(inverse_scale=inverse_scale))[0]


class _StraightThrough(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor | None, product: QuantizedProduct) -> Tensor:
        assert not weight.requires_grad, "quantised weights are frozen"
        ctx.save_for_backward(weight, offsets)
        ctx.product = product
        return product.results(x, weight, offsets)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        grad: Tensor,
    ) -> tuple[Tensor, None, None, None]:
        return ctx.product.input_gradient(grad, *ctx.saved_tensors), None, None, None


@torch.no_grad()
def install(module: Linear | GroupedLinear, weights: Iterable[QuantizedWeight]) -> None:
    """Give a module a quantised weight to multiply by: it becomes bf16 `gemm_values`, or codes of FP8.

    Args:
        module: on its device, not sharded.
        weights: one for a `Linear`, one for each expert of a `GroupedLinear`, alike in format and in whether inputs are
            quantised; taken one after the other.
    """
    values = torch.empty(module.weight.shape, dtype=torch.bfloat16, device=module.weight.device)
    fill(module, weights, values, range(len(values)))
    operands = module.product.operands
    assert operands is not None
    if operands.format == "fp8" and _multiplies_fp8(values):
        values = values.to(torch.float8_e4m3fn)  # the codes
    module.weight = nn.Parameter(values, requires_grad=False)


@torch.no_grad()
def fill(
    module: Linear | GroupedLinear, weights: Iterable[QuantizedWeight], values: Tensor, rows: Sequence[int]
) -> None:
    """Write the bf16 `gemm_values` of a quantised weight, and give the module their format and product.

    Args:
        module: on its device, sharded along dimension 0 or not.
        weights: see `install`; each rank reads all, for their scales.
        values: bf16, what this rank holds of the module's weight.
        rows: indices along dimension 0 that it holds.
    """
    kinds: set[tuple[WeightFormat, bool]] = set()
    scales: list[Tensor] = []
    input_scales: list[Tensor] = []
    for number, weight in enumerate(weights):
        if module.weight.ndim == 2:
            values.copy_(gemm_values(weight)[rows[0] : rows[-1] + 1] if rows else values)
        elif number in rows:
            values[rows.index(number)] = gemm_values(weight)
        kinds.add((weight.format, weight.input_scale is None))
        scales.append(weight.scale)
        input_scales += [] if weight.input_scale is None else [weight.input_scale]
    assert len(kinds) == 1, kinds
    assert len(scales) == module.weight.shape[:-2].numel(), len(scales)
    chosen, device = next(iter(kinds))[0], values.device
    inputs = torch.stack(input_scales).to(device) if input_scales else None
    module.format, module.product = chosen, QuantizedProduct(chosen, torch.stack(scales).to(device), inputs)


def _multiplies_fp8(weight: Tensor) -> bool:
    """Return whether the device of a weight multiplies it in FP8."""
    if device_kind(weight) != "cuda" or torch.version.hip is not None:
        return False
    capability = torch.cuda.get_device_capability(weight.device)
    return capability >= (8, 9) and weight.ndim == 2 and not any(size % _MULTIPLE for size in weight.shape)


@contextmanager
def temporarily(module: Linear | GroupedLinear, weights: Iterable[QuantizedWeight]) -> Iterator[None]:
    """`install` for a while; afterwards the module is what it was, to the bit."""
    before = module.weight, module.format, module.product
    try:
        install(module, weights)
        yield
    finally:
        module.weight, module.format, module.product = before
