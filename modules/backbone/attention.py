"""Grouped-query attention without positions and biases (Mamba layers give the order of tokens)."""

from torch import Tensor, nn

from modules.backbone.cache import AttentionState
from modules.backbone.config import BackboneConfig
from modules.ops.attention import attention
from modules.ops.documents import DocumentLayout
from modules.precision.linear import Linear


class Attention(nn.Module):
    """Causal self-attention mixer.

    Args:
        config: the backbone's configuration.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size, key_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = Linear(config.hidden_size, query_size)
        self.k_proj = Linear(config.hidden_size, key_size)
        self.v_proj = Linear(config.hidden_size, key_size)
        self.o_proj = Linear(query_size, config.hidden_size)

    def forward(self, x: Tensor, documents: DocumentLayout | None, state: AttentionState | None = None) -> Tensor:
        """Map [B, T, D] to [B, T, D]; attends inside documents, or to what `state` remembers too."""
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attention(query, key, value, documents) if state is None else state.attend(query, key, value)
        return self.o_proj(out.flatten(-2))
