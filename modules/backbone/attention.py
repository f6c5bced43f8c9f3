"""Grouped-query attention without positions and biases (Mamba layers give the order of tokens)."""

from typing import ClassVar

import torch
from torch import Tensor

from modules.backbone.cache import AttentionState
from modules.backbone.config import BackboneConfig
from modules.backbone.mixer import FlopCount, Mixer
from modules.ops.attention import attention
from modules.ops.documents import DocumentLayout
from modules.precision import fp8
from modules.precision.linear import Linear


class Attention(Mixer):
    """Causal self-attention mixer.

    Args:
        config: the backbone's configuration.
    """

    PARTS: ClassVar = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "attention projections")
    WEIGHTLESS: ClassVar = {"q_proj": "attention scores"}

    kv_scales: tuple[float, float] | None = None
    """Scales of keys and values where engines cache them in FP8 (E4M3), largest magnitude over 448: what is attended to
    is then what is left of them, with a cache and without. None: they stay as they are. There is no gradient then."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size, key_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = Linear(config.hidden_size, query_size)
        self.k_proj = Linear(config.hidden_size, key_size)
        self.v_proj = Linear(config.hidden_size, key_size)
        self.o_proj = Linear(query_size, config.hidden_size)
        self.o_proj.writes_residual = True

    def forward(self, x: Tensor, documents: DocumentLayout | None, state: AttentionState | None = None) -> Tensor:
        """Map [B, T, D] to [B, T, D]; attends inside documents, or to what `state` remembers too."""
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, value = query.to(key.dtype), value.to(key.dtype)  # each projection may have a format of its own
        if self.kv_scales is not None:
            key, value = (_rounded(x, scale) for x, scale in zip((key, value), self.kv_scales, strict=True))
        out = attention(query, key, value, documents) if state is None else state.attend(query, key, value)
        return self.o_proj(out.flatten(-2))

    def weightless_flops(self, length: int, context: int | None) -> FlopCount:
        """See `Mixer`: scores and their product with the values; the backward pass computes the scores again."""
        product = 2 * length * (context or length) * self.o_proj.weight.shape[1]
        return FlopCount(2 * product, 5 * product)


def _rounded(x: Tensor, scale: float) -> Tensor:
    """Return what FP8 leaves of keys or values [B, T, K, P], in their dtype."""
    assert not (x.requires_grad and torch.is_grad_enabled()), "keys and values in FP8 have no gradient"
    return fp8.quantize_dequantize(x, torch.full((), 1 / scale, device=x.device))
