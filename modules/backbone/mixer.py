"""What the mixers have in common: they say of themselves what counts and tables have to know."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one part."""

    forward: int = 0
    """Forward pass."""
    backward: int = 0
    """Backward pass: gradients of inputs and weights."""

    @classmethod
    def of_products(cls, multiply_adds: int) -> "FlopCount":
        """Count matrix products, each with the two products of its gradients."""
        return cls(2 * multiply_adds, 4 * multiply_adds)

    @property
    def total(self) -> int:
        """Forward and backward pass."""
        return self.forward + self.backward

    def __add__(self, other: "FlopCount") -> "FlopCount":
        return FlopCount(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, copies: int) -> "FlopCount":
        return FlopCount(self.forward * copies, self.backward * copies)


class Mixer(nn.Module):
    """What a layer computes between its norm and the residual stream."""

    PARTS: ClassVar[dict[str, str]]
    """What the children that multiply by weights are called in counts and tables, in the order to show."""
    WEIGHTLESS: ClassVar[dict[str, str]] = {}
    """What products without weights are called there, by the child whose results they multiply."""

    def weightless_flops(self, length: int, context: int | None) -> FlopCount:
        """Count products without weights.

        Args:
            length: positions T of a row.
            context: positions that the last of them looks at, those cached included; None: a training pass.
        """
        return FlopCount()
