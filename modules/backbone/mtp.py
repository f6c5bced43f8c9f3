"""Multi-token prediction: one physical block applied at every depth (arXiv 2412.19437, 2.2; Nemotron 3 Super, 2.1.2).

Depth k predicts the token k + 1 ahead: h_k = norm(block(eh_proj[enorm(embedding(t_{i+k})); hnorm(h_{k-1})])), with h_0
the backbone's hidden state after its final norm. Sharing the block exposes it to its own states, so that it can be
applied further than it was trained. Embedding and head are the backbone's.
"""

import torch
from torch import Tensor, nn

from modules.backbone.cache import Cache
from modules.backbone.config import BackboneConfig
from modules.backbone.layer import Layer, Observer
from modules.backbone.normalization import RMSNorm
from modules.backbone.router import Routing
from modules.ops.documents import DocumentLayout
from modules.precision.linear import Linear


class MTPBlock(nn.Module):
    """The shared MTP block.

    Its first inner layer carries `enorm`, `hnorm` and `eh_proj`, its last `final_layernorm`: where the published
    checkpoints have them.

    Args:
        config: the backbone's configuration.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        size, epsilon = config.hidden_size, config.layer_norm_epsilon
        pattern = config.mtp_hybrid_override_pattern
        self.layers = nn.ModuleList(Layer(config, letter) for letter in pattern)
        self.remembering = 1 + max(pattern.rfind("*"), pattern.rfind("M"))
        """How many of the first layers a cache needs: none behind them remembers anything."""
        self.observer: Observer | None = None
        self.layers[0].add_module("enorm", RMSNorm(size, epsilon))
        self.layers[0].add_module("hnorm", RMSNorm(size, epsilon))
        self.layers[0].add_module("eh_proj", Linear(2 * size, size))
        self.layers[-1].add_module("final_layernorm", RMSNorm(size, epsilon))

    def forward(
        self,
        embedded: Tensor,
        hidden: Tensor,
        documents: DocumentLayout | None,
        cache: Cache | None = None,
        whole: bool = True,
    ) -> tuple[Tensor, list[Routing]]:
        """Apply the block at one depth.

        Args:
            embedded: [B, T, D], embedding of the token `depth` positions ahead.
            hidden: [B, T, D], normalised hidden state of the depth before.
            documents: borders of the documents.
            cache: what the block remembers of the positions before, begun; no `Routing` is then worked out.
            whole: with a cache, whether a result is wanted; else the layers behind the last that remembers are left
                out, and what is returned has no meaning.

        Returns:
            (normalised hidden state [B, T, D], `Routing` of each mixture layer).
        """
        enorm, hnorm, eh_proj = (self.layers[0].get_submodule(name) for name in ("enorm", "hnorm", "eh_proj"))
        x = eh_proj(torch.cat([enorm(embedded), hnorm(hidden)], dim=-1)).to(hidden.dtype)
        routings = []
        for number, layer in enumerate(self.layers if whole else self.layers[: self.remembering]):
            state = None if cache is None else cache.states[number]
            x, routing = layer(x, documents, state, cache is not None)
            if self.observer is not None and cache is None:
                self.observer(layer, x, routing)
            if routing is not None:
                routings.append(routing)
        return self.layers[-1].get_submodule("final_layernorm")(x), routings
