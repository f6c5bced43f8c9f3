"""Are the experts healthy, and does the residual stream keep its size: what happens inside the network, layer by layer.

Such trouble hides behind a falling loss for a long time: experts that no token reaches, a router that has made up its
mind too early or not at all, a layer whose output grows without bound.

Only every so many steps is anything computed, beside the forward pass, on the device; it is read once, when the step is
logged. Values are of the whole step, over its micro-batches and all ranks, positions of padding included.
Shapes: B rows, T positions, D hidden, E experts, R routers.
"""

import math

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from callbacks.step import StepCallback, begins_due_step, check_interval, stage
from modules.backbone.layer import Layer
from modules.backbone.model import Network
from modules.backbone.router import Routing
from modules.base import StageModule
from modules.batch import Window


class Health(StepCallback):
    """Logs `experts/...` and `residual/...`.

    `residual/rms/LAYER` is the root mean square of the residual stream behind a layer. `experts/router_entropy/LAYER`
    is the mean over tokens of -sum_e p_e log p_e / log E, with p the sigmoid scores divided by their sum (the bias has
    no part in them): 1 where a router finds all experts alike, 0 where it knows only one. For the others see
    `expert_metrics`. `experts/VALUE/worst` is the worst layer's.

    Args:
        every_n_steps: Optimiser steps between points (>= 1); there is one after the first step and after the last.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = check_interval(every_n_steps, "health.every_n_steps")
        self._observation: Observation | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Window, batch_idx: int) -> None:
        """Begin to look if the step that begins is due."""
        if begins_due_step(self.every_n_steps, trainer):
            network = stage(pl_module).built_network
            self._observation = Observation(network)
            network.observe(self._observation.add)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Window, batch_idx: int
    ) -> None:
        """Log a step that was looked at."""
        if self._observation is None:
            return
        module = stage(pl_module)
        network = module.built_network
        network.observe(None)
        rms, entropy = self._observation.means(module)
        self._observation = None
        names = layer_names(network)
        metrics = {f"residual/rms/{name}": value for name, value in zip(names, rms, strict=True)}
        if module.expert_counts is not None:
            mixtures = [index for index, layer in enumerate(layers(network)) if layer.letter == "E"]
            bias = torch.stack([router.e_score_correction_bias for router in network.routers()])
            values = expert_metrics(module.expert_counts, bias) | {"router_entropy": entropy[mixtures]}
            metrics |= name_experts(values, [names[index] for index in mixtures])
        module.metrics.record_all(metrics)


class Observation:
    """Sums over what the layers return in the micro-batches of a step.

    Args:
        network: whose layers are looked at.
    """

    def __init__(self, network: Network) -> None:
        self._index: dict[nn.Module, int] = {layer: index for index, layer in enumerate(layers(network))}
        size, device = len(self._index), next(network.parameters()).device
        self._squares, self._entropies = torch.zeros(size, device=device), torch.zeros(size, device=device)
        self._values, self._tokens = [0] * size, [0] * size

    @torch.no_grad()
    def add(self, layer: nn.Module, x: Tensor, routing: Routing | None) -> None:
        """Add what a layer returned; an `Observer`."""
        index = self._index[layer]
        self._squares[index] += torch.linalg.vector_norm(x, dtype=torch.float32).square()
        self._values[index] += x.numel()
        if routing is not None:
            largest = math.log(routing.probabilities.shape[-1]) or 1.0  # one expert: no choice, entropy 0
            self._entropies[index] += torch.special.entr(routing.probabilities).sum() / largest
            self._tokens[index] += routing.probabilities[..., 0].numel()

    def means(self, module: StageModule) -> tuple[Tensor, Tensor]:
        """Return two fp32 [layers], over all ranks: RMS of the residual stream, entropy of the router (or 0)."""
        sums = torch.stack([self._squares, self._entropies]).double()
        numbers = torch.tensor([self._values, self._tokens], device=sums.device)
        squares, entropies, values, tokens = module.strategy.all_reduce(torch.cat([sums, numbers]))
        return (squares / values).sqrt().float(), (entropies / tokens.clamp(min=1)).float()


def expert_metrics(counts: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """Return what is told of the experts of each layer, fp32 [R] by name.

    Args:
        counts: int64 [R, E], tokens that each expert got.
        bias: fp32 [R, E], the bias that steers the choice.

    Returns:
        `load_max_over_mean`: tokens of the busiest expert over the mean; even: 1.
        `load_variation`: standard deviation over mean of the experts' tokens (coefficient of variation); even: 0.
        `dead_fraction`: share of the experts without a token.
        `bias_spread`: largest minus smallest bias.
    """
    load = counts.float()
    mean = load.mean(1)
    return {
        "load_max_over_mean": load.amax(1) / mean,
        "load_variation": load.std(1, correction=0) / mean,
        "dead_fraction": (counts == 0).float().mean(1),
        "bias_spread": bias.amax(1) - bias.amin(1),
    }


def name_experts(values: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Return [R] values as scalars `experts/VALUE/LAYER` and `experts/VALUE/worst`."""
    metrics = {}
    for value, by_layer in values.items():
        worst = by_layer.amin() if value == "router_entropy" else by_layer.amax()
        metrics[f"experts/{value}/worst"] = worst
        metrics |= {f"experts/{value}/{name}": number for name, number in zip(names, by_layer, strict=True)}
    return metrics


def layers(network: Network) -> list[Layer]:
    """Return the layers in the order of `Network.routers()`: the backbone's, then the MTP block's."""
    return [module for module in network.modules() if isinstance(module, Layer)]


def layer_names(network: Network) -> list[str]:
    """Return names numbered as in checkpoints: `layer_07` is `backbone.layers.7`, `mtp_1` is `mtp.layers.1`."""
    depth = len(network.backbone.layers)
    inner = len(layers(network)) - depth
    return [f"layer_{index:02d}" for index in range(depth)] + [f"mtp_{index}" for index in range(inner)]
