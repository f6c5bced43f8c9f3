"""A matrix product times a number, rounded once.

Products of quantised operands leave the tensors' scales outside. Hardware multiplies its fp32 sums by them before it
rounds to bf16, and so does this; multiplying a bf16 product would round twice.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from modules.ops.kernels import cpu_multiplies_bf16, device_kind


# An operation of its own: a CPU reads the scale on the host, which has no value on the meta device.
@torch.library.custom_op("superbolt::scaled_product", mutates_args=())
def scaled_product(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Return `scale * a @ b`.

    Args:
        a: [M, K], bf16.
        b: [K, N], bf16.
        scale: fp32 scalar.

    Returns:
        bf16 [M, N].
    """
    return multiply(a, b, scale)


@scaled_product.register_fake
def _(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@register_flop_formula(torch.ops.superbolt.scaled_product)
def _(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def multiply(a: Tensor, b: Tensor, scale: Tensor | float, out: Tensor | None = None) -> Tensor:
    """Do what `scaled_product` does, without the cost of an operation of its own where the host knows the scale.

    Args:
        a: [M, K], bf16.
        b: [K, N], bf16.
        scale: a number, or an fp32 scalar.
        out: where the result goes, on a CPU; None: into a new tensor.

    Returns:
        bf16 [M, N].
    """
    if device_kind(a) == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32).mul_(scale).to(a.dtype)
    if cpu_multiplies_bf16():
        return torch.addmm(a.new_empty(1, 1), a, b, beta=0, alpha=float(scale), out=out)
    product = torch.mm(a.float(), b.float()).mul_(float(scale))
    return product.to(a.dtype) if out is None else out.copy_(product)
