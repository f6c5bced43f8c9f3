"""LoRA: which linear layers get adapters (`adapter.py`), and a base that is left as it is.

What does not train needs neither gradient nor fp32 master: frozen weights are kept in the dtype they are multiplied in,
which changes no result, and adapters are fp32 as all that trains. The head, the embedding and routers have none.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from modules.errors import UserError
from modules.precision.adapter import Adapter, seed_of
from modules.precision.linear import FormattedModule, GroupedLinear, Head, Linear
from modules.precision.table import without_numbers

KEY = "model.init_args.lora"


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters beside frozen weights (arXiv 2106.09685): y + alpha / rank x B A x.

    Raises:
        UserError: if a value is out of range.
    """

    rank: int = 16
    """Rank r of every adapter: A is [r, in], B [out, r]; of routed experts for each of them. >= 1."""
    alpha: float = 32.0
    """What B A x is multiplied by, times the rank; > 0."""
    dropout: float = 0.0
    """Share of its inputs that A does not see in training, drawn anew for each micro-batch; in [0, 1)."""
    patterns: list[str] = field(default_factory=lambda: ["*.mixer.*_proj"])
    """Shell patterns over module names (`*` also matches dots); each must match. The layers there are: attention's
    `q_proj k_proj v_proj o_proj`, Mamba-2's `in_proj out_proj`, latent `fc1_latent_proj fc2_latent_proj`, `up_proj
    down_proj` of MLPs, shared and routed experts, and `eh_proj` of an MTP block."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.rank < 1:
            raise UserError(f"{KEY}.rank: {self.rank} must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"{KEY}.alpha: {self.alpha} must be positive and finite")
        if not 0 <= self.dropout < 1:
            raise UserError(f"{KEY}.dropout: {self.dropout} must lie in [0, 1)")
        if not self.patterns:
            raise UserError(f"{KEY}.patterns: there are none; say which layers are adapted, e.g. '*.mixer.*_proj'")


def attach(network: nn.Module, config: LoRAConfig) -> None:
    """Give the layers that the patterns name adapters, on their devices, without values.

    Args:
        network: built of `precision.linear` modules, before it is sharded.
        config: what is adapted, and how.

    Raises:
        UserError: if a pattern matches no layer.
    """
    layers = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, Linear | GroupedLinear) and not isinstance(module, Head)
    }
    for pattern in config.patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            kinds = ", ".join(dict.fromkeys(map(without_numbers, layers)))
            raise UserError(f"{KEY}.patterns: {pattern!r} matches no layer; mend or remove it. There are {kinds}")
    for name, module in layers.items():
        if any(fnmatchcase(name, pattern) for pattern in config.patterns):
            adapter = Adapter(module.weight.shape, config.rank, config.alpha / config.rank, config.dropout)
            module.adapter = adapter.to(module.weight.device)


def freeze_base(network: nn.Module) -> None:
    """Let nothing train but the adapters; weights that are multiplied in bf16 are kept in it.

    Args:
        network: on the meta device, with formats and adapters.
    """
    network.requires_grad_(False)
    weights = [module.weight for module in network.modules() if isinstance(module, FormattedModule)]
    for module in network.modules():
        if isinstance(module, Adapter):
            module.requires_grad_(True)
        elif isinstance(module, FormattedModule) and sum(weight is module.weight for weight in weights) == 1:
            module.weight = nn.Parameter(module.weight.to(module.compute_dtype), requires_grad=False)


def adapters(network: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Yield the name of each adapted layer, and its adapter."""
    for name, module in network.named_modules():
        if isinstance(module, Adapter):
            yield name.rpartition(".")[0], module


def reseed(network: nn.Module, *numbers: int) -> None:
    """Begin the dropout of every adapter anew, by its name and these numbers (the run's, the micro-batch's).

    So a resumed run draws what the uninterrupted one would, and no checkpoint need hold a generator's state.
    """
    for name, adapter in adapters(network):
        if adapter.dropout:
            adapter.seed = seed_of(*numbers, name)
