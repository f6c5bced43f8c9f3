"""Which experts had something to learn in a step: those whose results a gradient reached that is not zero.

A token is not enough: nothing is asked of padding and of the ends of documents, and the gradient of an expert that got
nothing else is zero as it should be.
Shapes: E experts, R rows sorted by expert, L their width.
"""

from functools import partial

import torch
from torch import Tensor, nn

from modules.backbone.latent_moe import Experts
from modules.backbone.model import Network
from modules.base import StageModule
from modules.ops.experts import row_experts


class ExpertRows:
    """Counts, from now on, the rows of each expert that a gradient reaches.

    Args:
        network: the network.
    """

    def __init__(self, network: Network) -> None:
        stacks = {name: module for name, module in network.named_modules() if isinstance(module, Experts)}
        device = next(network.parameters()).device
        self._counts = {
            name: torch.zeros(len(module.up_proj.weight), dtype=torch.int64, device=device)
            for name, module in stacks.items()
        }
        self._handles = [
            module.register_forward_hook(partial(_watch, self._counts[name])) for name, module in stacks.items()
        ]

    def end(self, module: StageModule) -> dict[str, Tensor]:
        """Stop counting.

        All ranks call this.

        Returns:
            Name of each stack of weights -> int64 [E], of all ranks.
        """
        for handle in self._handles:
            handle.remove()
        if not self._counts:
            return {}
        counts = module.strategy.all_reduce(torch.stack([*self._counts.values()]))
        return {
            f"{name}.{weight}": rows
            for name, rows in zip(self._counts, counts, strict=True)
            for weight in ("up_proj", "down_proj")
        }


def _watch(counts: Tensor, module: nn.Module, inputs: tuple[Tensor, Tensor], out: Tensor) -> None:
    """Count when the gradient of the experts' results [R, L] comes; a forward hook."""
    if out.requires_grad:
        out.register_hook(partial(_count, counts, inputs[1]))


def _count(counts: Tensor, offsets: Tensor, grad: Tensor) -> None:
    reached = (grad != 0).any(1).long()  # NaN is not zero
    counts.index_add_(0, row_experts(len(grad), offsets), reached)
