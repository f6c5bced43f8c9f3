"""What quantising does to the operands of matrix products: sums on the device, and the curves made of them.

Of an operand only the elements that are not zero count. So neither the zeros that fill up blocks nor those of a squared
ReLU make a share look smaller, and what is lost is set against what could be lost. Operands of a weight gradient that
are rotated are looked at as they are multiplied, rotated.
Shapes: S operands, the modules' in turn.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from callbacks.step import with_summary, worst_and_mean
from modules.precision.scheme import Scheme

OPERANDS = ("fprop.x", "fprop.w", "dgrad.g", "dgrad.w", "wgrad.g", "wgrad.x")
"""Product and tensor: x inputs, w weight, g gradient of the results."""
SUMS = 5


class OperandSums:
    """Sums over all elements of the operands of a step, per module and operand.

    With activation checkpointing a forward pass is seen twice, the same numbers both times: every sum of its operands
    doubles, and no share or ratio changes.

    Args:
        schemes: of the modules, by the name that their curves get.
        device: where they compute.
    """

    def __init__(self, schemes: Mapping[str, Scheme], device: torch.device) -> None:
        self._names = [(name, operand) for name in schemes for operand in OPERANDS]
        self._places = {scheme: index * len(OPERANDS) for index, scheme in enumerate(schemes.values())}
        self.sums = torch.zeros(len(self._names), SUMS, dtype=torch.float64, device=device)
        """[S, 5], of this rank: see `operand_sums`."""

    @torch.no_grad()
    def add(self, scheme: Scheme, operand: str, before: Tensor, after: Tensor, bound: Tensor) -> None:
        """Add an operand; an `OperandObserver` of the schemes' arithmetic."""
        self.sums[self._places[scheme] + OPERANDS.index(operand)] += operand_sums(before, after, bound)

    def metrics(self, sums: Sequence[Sequence[float]]) -> dict[str, float]:
        """Return the curves of sums [S, 5] of all ranks, see `operand_metrics`."""
        return operand_metrics(dict(zip(self._names, sums, strict=True)))


def operand_sums(before: Tensor, after: Tensor, bound: Tensor) -> Tensor:
    """Return fp64 [5] of an operand, for arguments as an `OperandObserver` gets them.

    In this order: elements that are not zero; those of them that have become zero; those that were clipped, beyond
    `bound`; the sum of the squares; the sum of the squared errors.
    """
    x = before.float()
    nonzero = torch.count_nonzero(before)
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in (x, x - after)]
    clipped = torch.count_nonzero(x.abs() > bound)
    return torch.stack([nonzero, nonzero - torch.count_nonzero(after), clipped, *(norm.square() for norm in norms)])


def operand_metrics(sums: Mapping[tuple[str, str], Sequence[float]]) -> dict[str, float]:
    """Return the curves of (module, operand) -> the five sums of `operand_sums`.

    An operand without a non-zero or with a number that is not finite has no point; one without an error has an infinite
    signal-to-noise ratio, which is left out.
    """
    underflow: dict[str, dict[str, float]] = {}
    saturation: dict[str, dict[str, float]] = {}
    snr: dict[str, dict[str, float]] = {}
    for (module, operand), (nonzero, vanished, clipped, power, error) in sums.items():
        if not nonzero or not math.isfinite(power + error):
            continue
        underflow.setdefault(operand, {})[module] = vanished / nonzero
        saturation.setdefault(operand, {})[module] = clipped / nonzero
        if error:
            snr.setdefault(operand, {})[module] = 10 * math.log10(power / error)
    metrics = {}
    for operand, values in underflow.items():
        metrics |= with_summary(f"quantization/underflow/{operand}", values, max)
    for operand, values in snr.items():
        metrics |= with_summary(f"quantization/snr_db/{operand}", values, min)
    worst: dict[str, float] = {}
    for operand, values in saturation.items():
        metrics |= worst_and_mean(f"quantization/saturation/{operand}", values, max)
        worst |= {module: max(value, worst.get(module, 0.0)) for module, value in values.items()}
    return metrics | {f"quantization/saturation/{module}": value for module, value in worst.items()}
