"""Networks with adapters that have moved, and the merged networks they must equal."""

import copy

import torch

from modules.backbone.initialization import initialize_adapters
from modules.backbone.model import Network
from modules.precision.lora import LoRAConfig, adapters, attach
from tests.modules.helpers import make_network, tiny_config

LORA = LoRAConfig(rank=3, alpha=6.0, patterns=["*_proj"])


@torch.no_grad()
def adapt(network: Network, lora: LoRAConfig = LORA, seed: int = 3) -> Network:
    """Give a network adapters whose B is not zero."""
    attach(network, lora)
    initialize_adapters(network, seed)
    generator = torch.Generator().manual_seed(seed)
    for _, adapter in adapters(network):
        adapter.B += 0.3 * torch.randn(adapter.B.shape, generator=generator)
    return network


def make_adapted(lora: LoRAConfig = LORA, **changes) -> Network:
    """A small network of every kind of layer, with adapters."""
    return adapt(make_network(tiny_config(**changes)), lora)


@torch.no_grad()
def merged(network: Network) -> Network:
    """The network without adapters, whose weights are W + scale x B A, in float64 and rounded once."""
    plain = copy.deepcopy(network)
    for name, adapter in adapters(network):
        layer = plain.get_submodule(name)
        delta = adapter.scale * (adapter.B.double() @ adapter.A.double())
        layer.weight.copy_(layer.weight.double() + delta)
        layer.adapter = None
    return plain
