"""Weighted averages of models, read tensor by tensor.

A merge is a `ModelFolder` of its own whose tensors are averages, so it is exported like any other model. Averaging the
checkpoints of a run's constant phase stands in for a decay of the learning rate (Nemotron 3 Super, section 2.5:
+2 to +4 points in the stable phase, without the tokens that a decay costs); see `decay_weights`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from modules.checkpoints.card import label
from modules.checkpoints.names import TensorInfo
from modules.checkpoints.quantization import Quantization
from modules.checkpoints.source import ModelFolder
from modules.checkpoints.start import differing_fields
from modules.errors import UserError
from modules.precision.quantized import QuantizedWeight


class MergedSource:
    """The weighted average of models as a `ModelFolder`; all but the weights is that of the first model.

    Every tensor is summed in fp32 and rounded once to the dtype it has in the first model: router biases (they steer
    which experts are chosen, and belong to the averaged routers), `A_log`, `D` and `dt_bias` too.

    Args:
        sources: the models, of one architecture.
        weights: one per model, not negative; divided by their sum.
        method: a sentence for the model card.

    Raises:
        UserError: weights and models do not fit together, or the models are of different architectures.
    """

    def __init__(self, sources: Sequence[ModelFolder], weights: Sequence[float], method: str) -> None:
        self._sources, self._weights = sources, normalize(weights, len(sources))
        first = sources[0]
        for other in sources[1:]:
            check_same_network(first, other)
        self.path, self.config = first.path, first.config
        self.tokenizer_folder, self.generation = first.tokenizer_folder, first.generation
        self.tensors: Mapping[str, TensorInfo] = first.tensors
        self.quantization: Quantization | None = None
        self.notes = [
            f"{source.path} is quantised; its weights are averaged as the numbers they mean, and the result is plain"
            for source in sources
            if source.quantization is not None
        ]
        models = [
            {"label": label(source), "weight": weight} for source, weight in zip(sources, self._weights, strict=True)
        ]
        kept = {key: value for key, value in first.facts.items() if key in ("config", "run")}
        self.facts: dict[str, Any] = {**kept, "merge": {"method": method, "models": models}}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return the average of a tensor in the first model's dtype; see `ModelFolder.read`."""
        total = torch.zeros(self.tensors[name].shape)[rows or slice(None)]
        for source, weight in zip(self._sources, self._weights, strict=True):
            if weight:
                total.add_(source.read(name, rows).float(), alpha=weight)
        return total.to(self.tensors[name].dtype)

    def read_quantized(self, name: str) -> QuantizedWeight:
        """Nothing is quantised here; see `ModelFolder.read_quantized`."""
        raise AssertionError(f"{name} is not quantised")


def normalize(weights: Sequence[float], models: int) -> list[float]:
    """Return weights divided by their sum.

    Raises:
        UserError: there is not one weight per model, or one is negative or not finite, or all are 0.
    """
    if len(weights) != models:
        raise UserError(f"--weights: {len(weights)} given for {models} MODELs; give one for each, in their order")
    for weight in weights:
        if not 0 <= weight < math.inf:
            raise UserError(f"--weights: {weight} must be finite and not negative")
    total = math.fsum(weights)
    if total == 0:
        raise UserError("--weights: all are 0; at least one must be positive")
    return [weight / total for weight in weights]


def decay_weights(steps: Sequence[int], factor: Callable[[int, int], float]) -> list[float]:
    """Return the weights whose average of checkpoints stands for a decay of the learning rate.

    With a constant learning rate, theta_j = theta_0 - sum_{u <= j} g_u over the updates g. So the average
    sum_j c_j theta_j = theta_0 - sum_u w_u g_u with w_u = sum_{j >= u} c_j: each update counts as if it had been made
    at the share w_u of the learning rate. Turned round, a decay w_1 >= ... >= w_k is had by

        c_0 = 1 - w_1,   c_j = w_j - w_{j+1},   c_k = w_k

    (WSM, arXiv 2507.17634; Nemotron 3 Super takes minus-sqrt for w, section 2.5). Between checkpoints that
    are several updates apart the share cannot change: w_j is then the decay's mean over the updates from checkpoint
    j - 1 to j, which moves as far in all as the decay would. What the average cannot have is that a run with a lower
    learning rate would have met other gradients.

    Args:
        steps: optimiser steps k + 1 >= 2 of the checkpoints, rising; the decay goes from the first to the last.
        factor: `factor(u, n)`: learning rate of update u of n of the decay, as a share of the peak; in [0, 1], falling.

    Returns:
        One weight per checkpoint; their sum is 1.
    """
    length = steps[-1] - steps[0]
    shares = [1.0]
    for before, after in pairwise(steps):
        updates = range(before - steps[0] + 1, after - steps[0] + 1)
        shares.append(math.fsum(factor(update, length) for update in updates) / len(updates))
    return [share - following for share, following in pairwise([*shares, 0.0])]


def check_same_network(first: ModelFolder, other: ModelFolder) -> None:
    """Check that two models can be averaged.

    Raises:
        UserError: their networks differ in fields that change numbers; names these.
    """
    names = differing_fields(first.config, other.config)
    if first.config.num_nextn_predict_layers != other.config.num_nextn_predict_layers:
        names.append("num_nextn_predict_layers")
    different = [f"{name} {getattr(first.config, name)!r} and {getattr(other.config, name)!r}" for name in names]
    if different:
        raise UserError(f"{first.path} and {other.path} are of different architectures: {', '.join(different)}")
