"""The stock of a small shop: what is there, what it costs, and what to order."""

from dataclasses import dataclass


@dataclass
class Item:
    """A kind of thing on the shelf."""

    name: str
    count: int
    price_in_cents: int
    least: int = 5

    @property
    def value(self) -> int:
        """Worth of all pieces, in cents."""
        return self.count * self.price_in_cents


def to_order(items: list[Item]) -> list[str]:
    """Return the names of what has run low, the scarcest first."""
    low = [item for item in items if item.count < item.least]
    return [item.name for item in sorted(low, key=lambda item: item.count)]


def worth(items: list[Item]) -> float:
    """Return the worth of the stock, in whole units of money."""
    return sum(item.value for item in items) / 100
