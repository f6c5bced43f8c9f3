"""LatentMoE (arXiv 2601.18089, eq. 1-2): routed experts in a latent space, router and shared expert on the full width.

y = W_up sum_i p_i E_i(W_down x) + shared(x). The projection comes before the dispatch and after the combine, so that
what travels is L wide, and no token is projected more than once. Without a latent it is a standard mixture.
"""

from typing import ClassVar

from torch import Tensor, nn

from modules.backbone.config import BackboneConfig
from modules.backbone.dispatch import Dispatcher, LocalDispatcher
from modules.backbone.mixer import Mixer
from modules.backbone.mlp import MLP, squared_relu
from modules.backbone.router import Router, Routing
from modules.precision.linear import GroupedLinear, Linear


class Experts(nn.Module):
    """The routed experts: non-gated MLPs with squared ReLU, weights stacked [E, out, in].

    Args:
        config: the backbone's configuration.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        experts, top_k = config.n_routed_experts, config.num_experts_per_tok
        size, inner = config.expert_size, config.moe_intermediate_size
        self.up_proj = GroupedLinear(experts, size, inner, top_k)
        self.down_proj = GroupedLinear(experts, inner, size, top_k)

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Map rows [R, L] sorted by expert, with end rows int32 [E], to [R, L]."""
        return self.down_proj(squared_relu(self.up_proj(rows, offsets)), offsets)


class LatentMoE(Mixer):
    """Mixture-of-experts mixer.

    Args:
        config: the backbone's configuration.
    """

    PARTS: ClassVar = {
        "gate": "MoE router",
        "fc1_latent_proj": "MoE latent projections",
        "fc2_latent_proj": "MoE latent projections",
        "experts": "MoE routed experts",
        "shared_experts": "MoE shared expert",
    }

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        hidden, shared = config.hidden_size, config.moe_shared_expert_intermediate_size
        self.num_experts = config.n_routed_experts
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.fc1_latent_proj = Linear(hidden, config.moe_latent_size) if config.moe_latent_size else None
        self.fc2_latent_proj = Linear(config.moe_latent_size, hidden) if config.moe_latent_size else None
        self.shared_experts = MLP(hidden, shared) if shared else None
        (self.fc2_latent_proj or self.experts.down_proj).writes_residual = True

    def forward(self, x: Tensor, routed: bool = True) -> tuple[Tensor, Routing | None]:
        """Map [B, T, D] to ([B, T, D], `Routing`, or None unless `routed`)."""
        weights, experts, routing = self.gate(x, routed)
        latent = x if self.fc1_latent_proj is None else self.fc1_latent_proj(x)
        flat_latent, flat_weights, flat_experts = (tensor.flatten(0, 1) for tensor in (latent, weights, experts))
        out = self.dispatcher(flat_latent, flat_weights, flat_experts, self.num_experts, self.experts)
        out = out.view_as(latent)
        if self.fc2_latent_proj is not None:
            out = self.fc2_latent_proj(out)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return out, routing
