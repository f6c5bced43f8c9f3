"""Bringing tokens to their experts and back. A strategy may install another dispatcher; this one stays on the device.

Shapes: N tokens, L width of the experts, K top-k, E experts, R = N x K rows sorted by expert.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

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
        # Not bincount: on CUDA it asks the host for its size.
        counts = flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))
        offsets = counts.cumsum(0).int()
        rows = compute(x[order // top_k], offsets)
        # Back to token order by a gather, then a sum over K: deterministic, unlike a scatter-add on CUDA.
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return torch.einsum("nkl,nk->nl", rows[back].view(tokens, top_k, -1).float(), weights).to(x.dtype)
