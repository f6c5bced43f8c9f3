"""The best mixture of formats under a budget of bits: a multiple-choice knapsack, solved exactly.

Each group of layers takes one of its options; costs add up to at most the budget, and the sum of losses is least. The
states after each group are the pairs (cost, loss) that no other beats in both (dynamic programming over the Pareto
front); those whose loss with the least conceivable rest, the linear relaxation of what is left, is no better than a
known solution are dropped. That keeps some hundreds of states where the front alone would double with each group.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from modules.errors import UserError

_SLACK = 1e-9
"""Share of the largest conceivable loss within which a bound does not count as worse: sums are rounded."""


class Option(NamedTuple):
    """What a group can take."""

    cost: int
    """Bits, in any integer unit."""
    loss: float
    """What it costs in quality, >= 0."""


class _Relaxation:
    """Least loss of some groups for a budget if options could be mixed: convex and piecewise linear."""

    def __init__(self, groups: Sequence[Sequence[Option]]) -> None:
        steps = []
        self.cost, self.loss = 0, 0.0
        for options in groups:
            hull = _lower_hull(options)
            self.cost, self.loss = self.cost + hull[0].cost, self.loss + hull[0].loss
            steps += [(b.cost - a.cost, b.loss - a.loss) for a, b in pairwise(hull)]
        steps.sort(key=lambda step: step[1] / step[0])
        self.costs = self.cost + np.cumsum([0, *(step[0] for step in steps)])
        self.losses = self.loss + np.cumsum([0.0, *(step[1] for step in steps)])

    def bound(self, budgets: np.ndarray) -> np.ndarray:
        """Return the least loss for budgets that are at least `cost`."""
        return np.interp(budgets, self.costs, self.losses)

    def reachable(self, budgets: np.ndarray) -> np.ndarray:
        """Return a loss that real options reach: of the last corner within the budget, where no group is mixed."""
        return self.losses[np.searchsorted(self.costs, budgets, side="right") - 1]


def _lower_hull(options: Sequence[Option]) -> list[Option]:
    """Return the options on the lower convex hull from the cheapest to the one with the least loss, by cost."""
    hull: list[Option] = []
    for option in sorted(options):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-1], option) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(a: Option, b: Option) -> float:
    return (b.loss - a.loss) / (b.cost - a.cost)


def choose(groups: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Return which option each group takes.

    Args:
        groups: options of each group.
        budget: most that their costs may add up to.

    Returns:
        Indices: of all choices within the budget the one with the least sum of losses, of equals one that is cheapest.

    Raises:
        UserError: even the cheapest options cost more than the budget.
    """
    if sum(min(option.cost for option in options) for options in groups) > budget:
        raise UserError("the budget is less than what the cheapest options cost")
    order = sorted(range(len(groups)), key=lambda index: -max(option.cost for option in groups[index]))
    rest = [_Relaxation([groups[index] for index in order[place:]]) for place in range(len(order) + 1)]
    costs, losses = np.zeros(1, dtype=np.int64), np.zeros(1)
    slack = _SLACK * sum(max(option.loss for option in options) for options in groups)
    known, trail = np.inf, []
    for place, index in enumerate(order):
        options = groups[index]
        costs = np.concatenate([costs + option.cost for option in options])
        losses = np.concatenate([losses + option.loss for option in options])
        after, states = rest[place + 1], len(costs) // len(options)
        kept = np.flatnonzero(costs + after.cost <= budget)
        kept = kept[np.lexsort((losses[kept], costs[kept]))]
        best_before = np.minimum.accumulate(np.concatenate([[np.inf], losses[kept][:-1]]))
        kept = kept[losses[kept] < best_before]
        left = budget - costs[kept]
        known = min(known, float((losses[kept] + after.reachable(left)).min()))
        kept = kept[losses[kept] + after.bound(left) <= known + slack]
        trail.append((kept % states, kept // states))
        costs, losses = costs[kept], losses[kept]
    state, chosen = int(losses.argmin()), [0] * len(groups)
    for (parents, taken), index in zip(reversed(trail), reversed(order), strict=True):
        chosen[index], state = int(taken[state]), int(parents[state])
    return chosen
