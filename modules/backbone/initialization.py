"""Initial weights, each tensor (and each expert) drawn from its own generator seeded with (seed, name).

So they depend neither on the order of construction nor on how tensors are laid over devices. Of experts a rank draws
those it holds; any other tensor it draws whole, and keeps its rows. Distributions are those published for Nemotron 3
(Megatron's): N(0, initializer_range); weights that write to the residual stream divided by sqrt(number of layers);
A ~ U(1, 16); softplus(dt_bias) log-uniform; D and norms 1.
"""

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from modules.backbone.config import BackboneConfig
from modules.backbone.mamba import CausalConvolution, Mamba2
from modules.backbone.model import Network
from modules.backbone.normalization import RMSNorm
from modules.precision.adapter import Adapter, seed_of
from modules.precision.linear import FormattedModule, GroupedLinear
from modules.precision.lora import adapters


@torch.no_grad()
def initialize(network: Network, seed: int) -> None:
    """Fill all parameters and buffers of `network` in place.

    Args:
        network: materialised (not on the meta device), sharded or not.
        seed: the run's seed.
    """
    _fill(network, seed, dict(network.named_parameters()))
    for router in network.routers():
        router.e_score_correction_bias.zero_()


@torch.no_grad()
def initialize_adapters(network: Network, seed: int) -> None:
    """Fill the adapters of `network` in place; arguments as in `initialize`."""
    names = [f"{name}.adapter.{matrix}" for name, _ in adapters(network) for matrix in "AB"]
    _fill(network, seed, {name: network.get_parameter(name) for name in names})


def _fill(network: Network, seed: int, parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        owner = network.get_submodule(name.rpartition(".")[0])
        local, rows = local_part(parameter), local_rows(parameter)
        if isinstance(owner, GroupedLinear) or (isinstance(owner, Adapter) and parameter.ndim == 3):
            for position, expert in enumerate(rows):
                local[position] = _draw(owner, name, parameter.shape[1:], seed, network.config, f".{expert}")
        else:
            local.copy_(_draw(owner, name, parameter.shape, seed, network.config)[rows])


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor."""
    return cast(Tensor, tensor.to_local()) if isinstance(tensor, DTensor) else tensor


def local_rows(parameter: Tensor) -> list[int]:
    """Return the indices along dimension 0 that this rank holds."""
    rows = torch.arange(parameter.shape[0])
    if isinstance(parameter, DTensor):
        for axis, placement in enumerate(parameter.placements):
            assert isinstance(placement, Replicate) or placement == Shard(0), placement
            if isinstance(placement, Shard):
                parts = rows.chunk(parameter.device_mesh.size(axis))
                rank = parameter.device_mesh.get_local_rank(axis)
                rows = parts[rank] if rank < len(parts) else rows[:0]
    return rows.tolist()


def _draw(
    owner: nn.Module, name: str, shape: torch.Size, seed: int, config: BackboneConfig, expert: str = ""
) -> Tensor:
    """Return initial values fp32 of a tensor (of one expert) on the CPU."""
    generator = torch.Generator().manual_seed(seed_of(seed, name + expert))
    values = torch.empty(shape)
    if isinstance(owner, RMSNorm):
        return values.fill_(1)
    if isinstance(owner, Mamba2 | CausalConvolution | Adapter):
        return owner.fill(name.rpartition(".")[2], values, generator)
    scale = config.initializer_range
    if isinstance(owner, FormattedModule) and owner.writes_residual and config.rescale_prenorm_residual:
        scale /= math.sqrt(len(config.hybrid_override_pattern))
    return values.normal_(0, scale, generator=generator)
