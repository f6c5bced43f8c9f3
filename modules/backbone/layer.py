"""One layer of the backbone: `x + mixer(norm(x))`."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.backbone.attention import Attention
from modules.backbone.cache import LayerState
from modules.backbone.config import BackboneConfig
from modules.backbone.latent_moe import LatentMoE
from modules.backbone.mamba import Mamba2
from modules.backbone.mlp import MLP
from modules.backbone.normalization import RMSNorm
from modules.backbone.router import Routing
from modules.ops.documents import DocumentLayout


class Layer(nn.Module):
    """A pre-norm residual layer with one mixer.

    Args:
        config: the backbone's configuration.
        letter: which mixer, one of M E * -.
    """

    def __init__(self, config: BackboneConfig, letter: str) -> None:
        super().__init__()
        self.letter = letter
        self.checkpointed = False
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        if letter == "M":
            self.mixer = Mamba2(config)
        elif letter == "*":
            self.mixer = Attention(config)
        elif letter == "E":
            self.mixer = LatentMoE(config)
        else:
            self.mixer = MLP(config.hidden_size, config.intermediate_size)

    @property
    def state_dtype(self) -> torch.dtype:
        """Dtype of what the mixer hands on to later positions: keys and values, or what it convolves."""
        if isinstance(self.mixer, Attention):
            return self.mixer.k_proj.compute_dtype
        return self.mixer.in_proj.compute_dtype if isinstance(self.mixer, Mamba2) else torch.float32

    def forward(
        self, x: Tensor, documents: DocumentLayout | None, state: LayerState | None = None, cached: bool = False
    ) -> tuple[Tensor, Routing | None]:
        """Map [B, T, D] to ([B, T, D], `Routing` of a mixture layer or None).

        With `cached`, attention and Mamba-2 go on from their `state`, and no `Routing` is worked out.

        With `checkpointed` set, activations are recomputed in the backward pass; none follows a `cached` pass. The
        checkpoint lies inside the layer, hence inside FSDP2's hooks, and what the recomputation routes is thrown away:
        no load is counted twice.
        """
        if self.checkpointed and self.training and not cached:
            return checkpoint(self._run, x, documents, use_reentrant=False)
        return self._run(x, documents, state, cached)

    def _run(
        self, x: Tensor, documents: DocumentLayout | None, state: LayerState | None = None, cached: bool = False
    ) -> tuple[Tensor, Routing | None]:
        normed = self.norm(x)
        routing = None
        if isinstance(self.mixer, LatentMoE):
            out, routing = self.mixer(normed, routed=not cached)
        elif isinstance(self.mixer, MLP):
            out = self.mixer(normed)
        else:
            out = self.mixer(normed, documents, state)
        return x + out.to(x.dtype), routing


Observer = Callable[[nn.Module, Tensor, Routing | None], None]
"""Gets a layer and what it returned: the residual stream [B, T, D] and the `Routing` of a mixture layer."""
