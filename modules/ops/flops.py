"""Counting the matrix products that really run, to hold formulas against and to divide by a measured time.

The convention is that of `torch.utils.flop_counter`: 2 per multiply-add, causal attention as the full square. It lacks
formulas for the grouped product of the experts and for attention on a CPU; and it counts convolutions, which are no
matrix products and are left out here. What runs inside a foreign kernel (mamba-ssm's Triton scan) cannot be counted.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
_CONVOLUTIONS = (aten.convolution, aten._convolution, aten.convolution_backward)


def count_flops(function: Callable[[], Any]) -> int:
    """Return the FLOPs of all matrix products that `function()` runs, backward passes inside it included."""
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with counter:
        function()
    return counter.get_total_flops()


def _no_flops(*_: Any, **__: Any) -> int:
    return 0


def _grouped_product(a_shape: list[int], b_shape: list[int], *_: Any, **__: Any) -> int:
    """FLOPs of `a @ b` in groups: [R, I] x [E, I, O] forward, [O, R] x [R, I] -> [E, O, I] for the weights."""
    flops = 2 * a_shape[-2] * a_shape[-1] * b_shape[-1]
    return flops * a_shape[0] if len(a_shape) == len(b_shape) == 3 else flops


def _attention(query: list[int], key: list[int], value: list[int], *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    grad: list[int],
    query: list[int],
    key: list[int],
    value: list[int],
    *_: Any,
    **__: Any,
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


_FORMULAS = {
    **dict.fromkeys(_CONVOLUTIONS, _no_flops),
    aten._grouped_mm: _grouped_product,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
