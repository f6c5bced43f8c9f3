"""The quantised weight of each layer, with the scales that engines expect of fused layers.

q, k and v of an attention layer share the scale of their weights, and of their inputs; all experts of a layer share
the scale of their inputs, one for up and one for down, as engines take the largest; each expert has a weight scale of
its own. An expert that calibration never reached thereby has the layer's.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modules.checkpoints.names import STACKED
from modules.checkpoints.source import ModelFolder
from modules.precision.formats import tensor_amax
from modules.precision.quantized import QuantizedWeight, ScaleSearch, WeightFormat, quantize_weight, tensor_scale
from modules.ptq.calibration import Calibration
from modules.ptq.layers import INPUTS, Choice, Group

FEW_TOKENS = 32
"""Tokens below which an expert's share in the layer's input scale says little: it is named."""


class _Place(NamedTuple):
    group: Group
    module: str


class WeightMaker:
    """Quantises the weights of a MODEL one by one.

    Args:
        source: the MODEL.
        groups: of its linear layers.
        calibration: what the layers whose inputs are quantised get; None: none is.
        search: of the block scales in NVFP4.
    """

    def __init__(
        self, source: ModelFolder, groups: Sequence[Group], calibration: Calibration | None, search: ScaleSearch
    ) -> None:
        self._source, self._calibration = source, calibration
        self._search: ScaleSearch = search
        self._places = {
            name: _Place(group, layer.module) for group in groups for layer in group.layers for name in layer.weights
        }
        self._fused: dict[str, Tensor] = {}

    def make(self, name: str, choice: Choice) -> QuantizedWeight:
        """Return a quantised weight.

        Args:
            name: public name.
            choice: of its group; not bf16.

        Raises:
            UserError: the tensor cannot be read.
        """
        group, module = self._places[name]
        format: WeightFormat = "fp8" if choice == "fp8" else "nvfp4"
        fused = _is_fused_attention(group)
        input_scale = None
        if choice in INPUTS:
            assert self._calibration is not None, f"{name} needs calibration"
            sharing = [layer.module for layer in group.layers] if fused else [module]
            input_amax = torch.stack([self._calibration.inputs[other].amax() for other in sharing]).amax()
            input_scale = tensor_scale(input_amax, format)
        amax = self._fused_amax(group) if fused else None
        return quantize_weight(self._source.read(name), format, amax=amax, input_scale=input_scale, search=self._search)

    def _fused_amax(self, group: Group) -> Tensor:
        if group.name not in self._fused:
            names = [name for layer in group.layers for name in layer.weights]
            maxima = [tensor_amax(self._source.read(name)) for name in names]
            self._fused[group.name] = torch.stack(maxima).amax()
        return self._fused[group.name]


def _is_fused_attention(group: Group) -> bool:
    return len(group.layers) > 1 and STACKED not in group.name


def kv_scales(calibration: Calibration) -> dict[str, tuple[float, float]]:
    """Return the scales of keys and values in an FP8 cache, by attention module: largest magnitude over 448."""
    return {
        name: (float(tensor_scale(keys, "fp8")), float(tensor_scale(calibration.values[name], "fp8")))
        for name, keys in calibration.keys.items()
    }


class ExpertCoverage(NamedTuple):
    """How well calibration reached the experts of a layer."""

    layer: str
    tokens: list[int]
    unreached: list[int]
    """Experts that saw no token."""
    few: list[int]
    """Experts that saw some, but fewer than `FEW_TOKENS`."""


def expert_coverage(
    groups: Sequence[Group], choices: Mapping[str, Choice], calibration: Calibration
) -> list[ExpertCoverage]:
    """Return the coverage of the experts whose inputs are quantised."""
    found = []
    for group in groups:
        counts = calibration.tokens.get(group.layers[0].module)
        if counts is None or choices[group.name] not in INPUTS:
            continue
        tokens = counts.tolist()
        unreached = [expert for expert, count in enumerate(tokens) if count == 0]
        few = [expert for expert, count in enumerate(tokens) if 0 < count < FEW_TOKENS]
        found.append(ExpertCoverage(group.name, tokens, unreached, few))
    return found
