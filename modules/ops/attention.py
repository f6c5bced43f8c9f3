"""Causal grouped-query attention inside documents, without positions.

Portable: one scaled-dot-product call per document, 3.5 to 5 times faster on a CPU than one call under a dense mask; on
CUDA the dense mask, so that nobody waits for the borders. Fast: torch's `varlen_attn` on CUDA in bf16.
Shapes: B rows, T positions, Q query heads, K key/value heads, P head dim.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.ops.documents import DocumentLayout
from modules.ops.kernels import takes_argument, uncompiled, varlen_attention_kernel


def attention(query: Tensor, key: Tensor, value: Tensor, documents: DocumentLayout | None = None) -> Tensor:
    """Attend causally inside each document, scores scaled by P ** -0.5.

    Args:
        query: [B, T, Q, P], fp32 or bf16.
        key: [B, T, K, P]; K divides Q, query head q reads key head q // (Q / K).
        value: [B, T, K, P].
        documents: borders attention must not cross; None: each row is one document.

    Returns:
        [B, T, Q, P] in the dtype of `query`.
    """
    if documents is None:
        return _attend(query, key, value)
    kernel = varlen_attention_kernel(query)
    if kernel is not None:
        return _attend_by_kernel(kernel, query, key, value, documents)
    if query.is_cuda:  # spans are read on the host
        return _attend(query, key, value, documents.mask)
    return _attend_by_span(query, key, value, documents)


def _attend_by_kernel(
    kernel: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, documents: DocumentLayout
) -> Tensor:
    """Attend by torch's `varlen_attn`; it takes fewer key than query heads from torch 2.13 on."""
    batch, length, heads = query.shape[:3]
    options: dict[str, bool] = {}
    if takes_argument(kernel, "enable_gqa"):
        options["enable_gqa"] = heads != key.shape[2]
    else:
        key, value = (tensor.repeat_interleave(heads // tensor.shape[2], dim=2) for tensor in (key, value))
    flat = (tensor.flatten(0, 1) for tensor in (query, key, value))
    boundaries = documents.boundaries
    # The longest document is not known here; a whole row bounds it, without asking the device.
    out = kernel(*flat, boundaries, boundaries, length, length, window_size=(-1, 0), **options)
    return out.unflatten(0, (batch, length))


@uncompiled  # a graph would hold for one set of spans only
def _attend_by_span(query: Tensor, key: Tensor, value: Tensor, documents: DocumentLayout) -> Tensor:
    flat = [tensor.flatten(0, 1).unsqueeze(0) for tensor in (query, key, value)]
    parts = [_attend(*(tensor[:, start:end] for tensor in flat)) for start, end in documents.spans]
    return torch.cat(parts, dim=1).view(query.shape)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend causally in each row, or as the mask [B, 1, T, T] says."""
    options = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": query.shape[2] != key.shape[2]}
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)
