"""The Mamba-2 mixer (arXiv 2405.21060) as Nemotron-H uses it.

`in_proj` packs (gate, x, B, C, dt); x, B, C pass a causal convolution with SiLU; the scan; a gated group RMSNorm with
the gate before the norm; `out_proj`. `A_log`, `D` and `dt_bias` are fp32 always, and dt is unlimited (0, inf).
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from modules.backbone.cache import MambaState
from modules.backbone.config import BackboneConfig
from modules.backbone.mixer import FlopCount, Mixer
from modules.backbone.normalization import GatedGroupRMSNorm
from modules.ops.convolution import causal_convolution
from modules.ops.documents import DocumentLayout
from modules.ops.ssd import ssd
from modules.precision.linear import Linear

_A_RANGE = (1.0, 16.0)
"""Of the initial decay rates."""


class CausalConvolution(nn.Module):
    """Depthwise causal convolution with SiLU; its weight has the shape of `nn.Conv1d`'s, [C, 1, k].

    Args:
        channels: C.
        taps: k.
        bias: whether there is a bias [C].
    """

    def __init__(self, channels: int, taps: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(self, x: Tensor, documents: DocumentLayout | None, state: MambaState | None = None) -> Tensor:
        """Map [B, T, C] to [B, T, C] in the dtype of `x`, inside documents or going on from `state`."""
        weight = self.weight.squeeze(1)
        if state is not None:
            return state.convolve(x, weight, self.bias)
        return causal_convolution(x, weight, self.bias, documents)

    def fill(self, name: str, values: Tensor, generator: torch.Generator) -> Tensor:
        """Return fp32 initial values of weight or bias, written over `values`."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        return values.uniform_(-bound, bound, generator=generator)


class Mamba2(Mixer):
    """Mamba-2 mixer.

    Args:
        config: the backbone's configuration.
    """

    PARTS: ClassVar = dict.fromkeys(("in_proj", "out_proj"), "Mamba-2 projections")
    WEIGHTLESS: ClassVar = {"in_proj": "Mamba-2 scan"}

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.head_dim, self.state_size = config.mamba_head_dim, config.ssm_state_size
        self.groups, self.chunk_size = config.n_groups, config.chunk_size
        inner, heads = config.mamba_inner_size, config.mamba_num_heads
        self.sizes = [inner, config.mamba_conv_size, heads]
        self.in_proj = Linear(config.hidden_size, sum(self.sizes))
        self.conv1d = CausalConvolution(config.mamba_conv_size, config.conv_kernel, config.use_conv_bias)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.norm = GatedGroupRMSNorm(inner, config.n_groups, config.layer_norm_epsilon)
        self.out_proj = Linear(inner, config.hidden_size)
        self.out_proj.writes_residual = True
        self.time_steps = config.time_step_min, config.time_step_max, config.time_step_floor

    def forward(self, x: Tensor, documents: DocumentLayout | None, state: MambaState | None = None) -> Tensor:
        """Map [B, T, D] to [B, T, D]; starts anew at each document, or goes on from `state`."""
        gate, mixed, dt = self.in_proj(x).split(self.sizes, dim=-1)
        mixed = self.conv1d(mixed, documents, state)
        inner, group_states = self.sizes[0], self.groups * self.state_size
        inputs, B, C = mixed.split([inner, group_states, group_states], dim=-1)
        inputs = inputs.unflatten(-1, (-1, self.head_dim))
        B, C = (tensor.unflatten(-1, (self.groups, -1)) for tensor in (B, C))
        A, D, dt_bias = -torch.exp(self.A_log.float()), self.D.float(), self.dt_bias.float()
        if state is None:
            y = ssd(inputs, dt, A, B, C, D, dt_bias, documents, self.chunk_size)
        else:
            y = state.scan(inputs, dt, A, B, C, D, dt_bias, self.chunk_size)
        return self.out_proj(self.norm(y.flatten(-2), gate))

    def fill(self, name: str, values: Tensor, generator: torch.Generator) -> Tensor:
        """Return fp32 initial values of `A_log`, `D` or `dt_bias`; overwrites `values`, which gives the shape."""
        if name == "D":
            return values.fill_(1)
        if name == "A_log":
            return values.uniform_(*_A_RANGE, generator=generator).log_()
        least, most, floor = self.time_steps
        dt = values.uniform_(math.log(least), math.log(most), generator=generator).exp_().clamp_(min=floor)
        return dt + torch.log(-torch.expm1(-dt))  # inverse of softplus

    def weightless_flops(self, length: int, context: int | None) -> FlopCount:
        """See `Mixer`; in training the products of `modules/ops/chunked_scan.py`, in their order."""
        inner, states = self.sizes[0], self.state_size
        if context is not None:
            return FlopCount(length * 2 * 2 * inner * states)  # h += dt x B^T, y = h C
        chunk = min(self.chunk_size, length)
        rows = -(-length // chunk) * chunk
        products = rows * states * chunk * self.groups  # C B^T, once per group
        products += rows * chunk * inner  # its product with dt x, per head
        products += 2 * rows * states * inner  # what a chunk adds to the state, and what the state before gives
        return FlopCount.of_products(products)
