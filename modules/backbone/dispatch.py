"""Bringing tokens to their experts and back. A strategy may install another dispatcher; this one stays on the device.

Shapes: N tokens, L width of the experts, K top-k, E experts, R = N x K rows sorted by expert.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

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
        rows = compute(_Spread.apply(x, order, back, experts.shape[1]), counts.cumsum(0).int())
        return _Combine.apply(rows, weights, back.view_as(experts))


# Both gradients are gathers and sums in a fixed order. Plain indexing adds them up with atomic operations, on a CPU
# with several threads too: the same run would give other weights each time.


class _Spread(Function):
    """Rows [R, L] in the order of their experts, `x[order // K]`, from tokens [N, L]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.shape = len(x), top_k, x.shape[1]
        return x.index_select(0, order // top_k)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        grad: Tensor,
    ) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back).view(ctx.shape).sum(1), None, None, None


class _Combine(Function):
    """Tokens [N, L]: the sum of each token's rows times its weights, in fp32.

    `rows` [R, L] are sorted by expert and `places` [N, K] says where each token's are. One choice after the other, so
    that what is between lies in a CPU's cache and no [R, L] in fp32 exists.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, places)
        out = rows.new_zeros(len(places), rows.shape[1], dtype=torch.float32)
        for weight, place in zip(weights.unbind(1), places.unbind(1), strict=True):
            out.addcmul_(rows.index_select(0, place).float(), weight.unsqueeze(1))
        return out.to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        grad: Tensor,
    ) -> tuple[Tensor, Tensor, None]:
        rows, weights, places = ctx.saved_tensors
        grad = grad.float()
        grad_rows, grad_weights = torch.empty_like(rows), torch.empty_like(weights)
        for choice, place in enumerate(places.unbind(1)):
            grad_weights[:, choice] = (rows.index_select(0, place).float() * grad).sum(1)
            grad_rows.index_copy_(0, place, (grad * weights[:, choice, None]).to(rows.dtype))
        return grad_rows, grad_weights, None
