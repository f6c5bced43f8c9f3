"""Initial weights, each tensor (and each expert) drawn from its own generator seeded with (seed, name).

So they depend neither on the order of construction nor on how tensors are laid over devices: a rank draws only what it
holds. Distributions are those published for Nemotron 3 (Megatron's): N(0, initializer_range); weights that write to the
residual stream divided by sqrt(number of layers); A ~ U(1, 16); softplus(dt_bias) log-uniform; D and norms 1.
"""

import hashlib
import math
from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from modules.backbone.config import BackboneConfig
from modules.backbone.model import Network

_A_RANGE = (1.0, 16.0)
_RESIDUAL_OUTPUTS = ("out_proj.weight", "o_proj.weight", "mixer.down_proj.weight", "shared_experts.down_proj.weight")


@torch.no_grad()
def initialize(network: Network, seed: int) -> None:
    """Fill all parameters and buffers of `network` in place.

    Args:
        network: materialised (not on the meta device), sharded or not.
        seed: the run's seed.
    """
    for name, parameter in network.named_parameters():
        _fill(parameter, name, seed, network.config)
    for router in network.routers():
        router.e_score_correction_bias.zero_()


def _fill(parameter: Tensor, name: str, seed: int, config: BackboneConfig) -> None:
    local, rows = local_part(parameter), local_rows(parameter)
    if ".experts." in name:
        for position, expert in enumerate(rows):
            local[position] = _draw(parameter.shape[1:], name, _generator(seed, f"{name}.{expert}"), config)
    else:
        local.copy_(_draw(parameter.shape, name, _generator(seed, name), config)[rows])


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


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _draw(shape: torch.Size, name: str, generator: torch.Generator, config: BackboneConfig) -> Tensor:
    """Return initial values fp32 of a tensor (of one expert) on the CPU."""
    kind = name.rsplit(".", 2)
    if name.endswith((".D", "norm.weight", "norm_f.weight", "final_layernorm.weight")):
        return torch.ones(shape)
    if name.endswith(".A_log"):
        return torch.empty(shape).uniform_(*_A_RANGE, generator=generator).log()
    if name.endswith(".dt_bias"):
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        dt = torch.empty(shape).uniform_(low, high, generator=generator).exp().clamp(min=config.time_step_floor)
        return dt + torch.log(-torch.expm1(-dt))  # inverse of softplus
    if kind[-2] == "conv1d":
        bound = 1 / math.sqrt(config.conv_kernel)
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    scale = config.initializer_range
    residual = name.endswith(_RESIDUAL_OUTPUTS)
    if config.moe_latent_size is None:
        residual |= name.endswith("experts.down_proj.weight")
    else:
        residual |= name.endswith("fc2_latent_proj.weight")
    if residual and config.rescale_prenorm_residual:
        scale /= math.sqrt(len(config.hybrid_override_pattern))
    return torch.empty(shape).normal_(0, scale, generator=generator)
