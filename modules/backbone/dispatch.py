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
        tokens, top_k = experts.shape
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        # Not bincount: on CUDA it asks the host for its size.
        counts = flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))
        rows = compute(_TakeRows.apply(x, order, back, top_k), counts.cumsum(0).int())
        rows = _TakeRows.apply(rows, back, order, 1).view(tokens, top_k, -1)
        return torch.einsum("nkl,nk->nl", rows.float(), weights).to(x.dtype)


class _TakeRows(Function):
    """`x[index // copies]` for a permutation `index` of len(x) x copies, with its inverse known.

    The gradient is then a gather and a sum over the copies, in a fixed order. Plain indexing adds it up with atomic
    operations, on a CPU with several threads too: the same run would give other weights each time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, copies: int) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x[index // copies]

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401
        grad: Tensor,
    ) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        grad = grad[inverse]
        return grad.unflatten(0, (-1, ctx.copies)).sum(1) if ctx.copies > 1 else grad, None, None, None
