"""Causal grouped-query attention inside documents, without positions.

Portable: one scaled-dot-product call per document, 3.5 to 5 times faster on a CPU than one call under a dense mask.
Fast: torch's `varlen_attn` on CUDA in bf16.
Shapes: B rows, T positions, Q query heads, K key/value heads, P head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.ops.documents import DocumentLayout
from modules.ops.kernels import varlen_attention_kernel


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
    batch, length = query.shape[:2]
    if documents is None:
        return _attend(query, key, value)
    kernel = varlen_attention_kernel()
    if kernel is not None and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        repeats = query.shape[2] // key.shape[2]
        flat = (tensor.flatten(0, 1) for tensor in (query, _repeat(key, repeats), _repeat(value, repeats)))
        boundaries = documents.boundaries
        out = kernel(*flat, boundaries, boundaries, length, length, window_size=(-1, 0))
        return out.unflatten(0, (batch, length))
    flat = [tensor.flatten(0, 1).unsqueeze(0) for tensor in (query, key, value)]
    parts = [_attend(*(tensor[:, start:end] for tensor in flat)) for start, end in documents.spans]
    return torch.cat(parts, dim=1).unflatten(1, (batch, length)).squeeze(0)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    gqa = query.shape[2] != key.shape[2]
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=gqa).transpose(1, 2)


def _repeat(tensor: Tensor, repeats: int) -> Tensor:
    return tensor.repeat_interleave(repeats, dim=2) if repeats > 1 else tensor
