"""Bringing tokens to their experts and back. A strategy may install another dispatcher; this one stays on the device.

Shapes: N tokens, L width of the experts, K top-k, E experts, R = N x K rows sorted by expert.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

Experts = Callable[[Tensor, Tensor], Tensor]
"""Maps rows [R, L] sorted by expert and end rows int32 [E] to rows [R, L]."""


class Dispatcher(Protocol):
    """Send each token through its experts and sum what comes back."""

    def __call__(self, x: Tensor, weights: Tensor, experts: Tensor, num_experts: int, compute: Experts) -> Tensor:
        """Combine the experts' results.

        Args:
            x: [N, L].
            weights: fp32 [N, K].
            experts: int64 [N, K], expert ids.
            num_experts: E.
            compute: the experts.

        Returns:
            [N, L] in the dtype of `x`: sum over K of weight x expert(x).
        """
        ...


class LocalDispatcher:
    """All experts on this device: sort the rows by expert, compute, weigh in fp32, sum per token."""

    def __call__(self, x: Tensor, weights: Tensor, experts: Tensor, num_experts: int, compute: Experts) -> Tensor:
        """See `Dispatcher`."""
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        # Not bincount: on CUDA it asks the host for its size.
        counts = flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))
        rows = compute(_Spread.apply(x, order, back), counts.cumsum(0).int())
        return _Combine.apply(rows, weights, order, back)


# Both gradients are gathers and sums in a fixed order. Plain indexing adds them up with atomic operations, on a CPU
# with several threads too: the same run would give other weights each time.


class _Spread(Function):
    """Rows [R, L] in the order of their experts, `x[order // K]`, from tokens [N, L]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(back)
        ctx.top_k = len(order) // max(len(x), 1)
        return x.index_select(0, order // ctx.top_k)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401
        grad: Tensor,
    ) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back).unflatten(0, (-1, ctx.top_k)).sum(1), None, None


class _Combine(Function):
    """Tokens [N, L]: the sum of each token's rows times its weights, in fp32; rows [R, L] are sorted by expert."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, back: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(rows, weights, order, back)
        per_token = rows.index_select(0, back).view(*weights.shape, -1)
        return (per_token * weights.unsqueeze(-1)).sum(1).to(rows.dtype)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401
        grad: Tensor,
    ) -> tuple[Tensor, Tensor, None, None]:
        rows, weights, order, back = ctx.saved_tensors
        spread = grad.index_select(0, order // weights.shape[1])
        grad_weights = (spread * rows).sum(1, dtype=torch.float32).index_select(0, back).view_as(weights)
        grad_rows = spread * weights.flatten().index_select(0, order).unsqueeze(1)
        return grad_rows.to(rows.dtype), grad_weights, None, None
