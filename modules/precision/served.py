"""Linear layers as an inference engine runs them: a checkpoint's quantised weight, inputs quantised on the way in.

The scale of the inputs is the checkpoint's, found by calibration, so what lies beyond the largest input it was found
for saturates, as it does in the engines; block scales of NVFP4 inputs are found anew in each call. Weight-only layers
take bf16 inputs. Products are those of the emulated backend: numbers times block scales, exact in bf16, multiplied with
fp32 sums, and the scales of both tensors applied once, behind the sum. There is no gradient.
Shapes: R rows, E experts, I in-features, O out-features.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from modules.ops.experts import multiply_rows, row_experts
from modules.ops.scaled import multiply
from modules.precision import fp8, nvfp4
from modules.precision.quantized import QuantizedWeight, WeightFormat, gemm_values

if TYPE_CHECKING:
    from modules.precision.linear import GroupedLinear, Linear


class Served:
    """How a module multiplies by the quantised weight that it holds as `gemm_values`.

    Args:
        format: of the weight, and of the inputs where they are quantised.
        scales: fp32 [E] of the weight (E = 1 in a `Linear`), on its device.
        input_scales: fp32 [E] of the inputs; None: they stay bf16.
    """

    def __init__(self, format: WeightFormat, scales: Tensor, input_scales: Tensor | None) -> None:
        self.format: WeightFormat = format
        self.quantizes_inputs = input_scales is not None
        self._scales = scales
        self._encode: Tensor | None = None  # S, of all inputs or [E]
        if input_scales is not None:
            self._scales = scales * input_scales
            alike = bool((input_scales == input_scales[0]).all())
            self._encode = (input_scales[0] if alike else input_scales).reciprocal()
        self._factor = float(self._scales[0])

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Map bf16 [..., I] by bf16 `gemm_values` [O, I] to bf16 [..., O]."""
        rows = self._round(x.reshape(-1, x.shape[-1]), self._encode)
        return multiply(rows, weight.T, self._factor).view(*x.shape[:-1], len(weight))

    def grouped_linear(self, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """Map bf16 rows [R, I] sorted by expert, with end rows int32 [E], by bf16 [E, O, I] to bf16 [R, O]."""
        encode = self._encode
        if encode is not None and encode.ndim:
            encode = encode[row_experts(len(x), offsets)]
        return multiply_rows(self._round(x, encode), weight.transpose(1, 2), offsets, self._scales)

    def _round(self, x: Tensor, encode: Tensor | None) -> Tensor:
        """Return inputs [R, I] times S, rounded: bf16, exact; as they are in a weight-only layer."""
        assert not (x.requires_grad and torch.is_grad_enabled()), "served layers have no gradient"
        if encode is None:
            return x
        if self.format == "fp8":
            return fp8.quantize(x, encode=encode).codes.bfloat16()
        return nvfp4.gemm_operand(x, encode=encode)[0]


@torch.no_grad()
def serve(module: "Linear | GroupedLinear", weights: Iterable[QuantizedWeight]) -> None:
    """Run a module as it is served from now on; its weight becomes bf16 `gemm_values`.

    Args:
        module: on its device, not sharded.
        weights: one for a `Linear`, one for each expert of a `GroupedLinear`, alike in format and in whether inputs are
            quantised; taken one after the other.
    """
    shape, device = module.weight.shape, module.weight.device
    values = torch.empty(shape, dtype=torch.bfloat16, device=device)
    kinds: set[tuple[WeightFormat, bool]] = set()
    scales: list[Tensor] = []
    input_scales: list[Tensor] = []
    stack = values if len(shape) == 3 else values[None]
    for place, weight in zip(stack, weights, strict=True):
        place.copy_(gemm_values(weight))
        kinds.add((weight.format, weight.input_scale is not None))
        scales.append(weight.scale)
        if weight.input_scale is not None:
            input_scales.append(weight.input_scale)
    assert len(kinds) == 1, kinds
    chosen = next(iter(kinds))[0]
    inputs = torch.stack(input_scales).to(device) if input_scales else None
    module.served = Served(chosen, torch.stack(scales).to(device), inputs)
    module.format, module.scheme = chosen, None
    module.weight = nn.Parameter(values, requires_grad=False)


@contextmanager
def served(module: "Linear | GroupedLinear", weights: Iterable[QuantizedWeight]) -> Iterator[None]:
    """Run a module as it is served for a while; afterwards it is what it was, to the bit.

    Args:
        module: see `serve`.
        weights: see `serve`.
    """
    before = module.weight, module.format, module.scheme, module.served
    try:
        serve(module, weights)
        yield
    finally:
        module.weight, module.format, module.scheme, module.served = before
