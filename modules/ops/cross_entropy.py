"""Output head and cross-entropy in chunks of tokens, so that [tokens, V] logits never exist.

The gradients of the hidden states and of the head are worked out chunk by chunk in the forward pass: two more matmuls
there instead of keeping logits (V = 131072: 0.5 MB a token in fp32) or computing them twice. Therefore each token's
weight in the loss must be known beforehand, and double backward is not possible.
Shapes: N tokens, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from modules.batch import IGNORED_LABEL

_CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**27}
"""Logits held at once (fp32): 16 MiB stay in a CPU's cache, 512 MiB keep a GPU busy."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the weighted cross-entropy of `hidden @ weight.T`.

    Args:
        hidden: [N, D], fp32 or bf16.
        weight: [V, D], dtype of `hidden`.
        labels: int64 [N], `IGNORED_LABEL` for no loss.
        token_weights: fp32 [N], weight of each token's loss in the sum (ignored tokens: any finite value).

    Returns:
        (sum over tokens of weight x nats, fp32 scalar, differentiable in `hidden` and `weight`;
        nats of each token, fp32 [N], 0 where ignored, detached).
    """
    if not torch.is_grad_enabled():  # a Function is told that gradients are needed even then
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, labels, token_weights)


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        token_weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        kept = labels != IGNORED_LABEL
        targets = torch.where(kept, labels, 0).unsqueeze(-1)
        scales = torch.where(kept, token_weights, 0.0)
        # The token weights scale the D-wide sides of the two gradient products, never the V-wide logits.
        scaled_hidden = (hidden * scales.unsqueeze(-1)).to(hidden.dtype) if needs_weight else None
        nats = torch.empty_like(scales)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        chunk = max(1, min(len(labels), _CHUNK_LOGITS[hidden.device.type] // weight.shape[0]))
        # Buffers are reused: a fresh allocation of this size costs more in page faults than the arithmetic in it.
        logits_buffer = hidden.new_empty(chunk, weight.shape[0])
        probability_buffer = torch.empty_like(logits_buffer, dtype=torch.float32)
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            rows = len(labels[part])
            logits, probabilities = logits_buffer[:rows], probability_buffer[:rows]
            torch.mm(hidden[part], weight.T, out=logits)
            torch.softmax(probabilities.copy_(logits), -1, out=probabilities)
            # log sum exp = largest logit - log of its probability, which is no less than 1 / V: one pass over exp.
            normalizer = logits.amax(-1).float() - probabilities.amax(-1).log()
            nats[part] = normalizer - logits.gather(1, targets[part]).squeeze(-1).float()
            if grad_hidden is None and grad_weight is None:
                continue
            gradient = probabilities
            gradient.scatter_add_(1, targets[part], gradient.new_full((rows, 1), -1.0))
            gradient = gradient if gradient.dtype == hidden.dtype else logits.copy_(gradient)
            if grad_hidden is not None:
                grad_hidden[part] = (gradient @ weight) * scales[part].unsqueeze(-1)
            if grad_weight is not None:
                assert scaled_hidden is not None
                if gradient.dtype == torch.float32:
                    torch.addmm(grad_weight, gradient.T, scaled_hidden[part], out=grad_weight)
                else:
                    grad_weight += gradient.T @ scaled_hidden[part]
        nats = torch.where(kept, nats, 0.0)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(nats)
        return (nats * scales).sum(), nats

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401
        grad_loss: Tensor,
        _: Tensor,
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None
