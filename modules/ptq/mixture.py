"""Formats for the groups that no rule decides, so that all weights together keep to a budget of bits."""

import math
from collections.abc import Mapping, Sequence

from modules.errors import UserError
from modules.ptq.layers import BITS, Choice, Decision, Group, counted
from modules.ptq.search import Option, choose

CANDIDATES: tuple[Choice, ...] = ("nvfp4", "fp8")
"""Formats that a searched group can get; it can also be kept, which costs nothing but bits."""
_UNITS = 2
"""Parts of a bit in which costs are counted, so that they are integers."""


def check_budget(groups: Sequence[Group], decisions: Mapping[str, Decision], bits: float) -> None:
    """Check that a budget can be met.

    Args:
        groups: all of the network's.
        decisions: of all groups.
        bits: most mean bits per weight, over the groups that count (`layers.counted`).

    Raises:
        UserError: even the smallest formats need more; names the least possible budget.
    """
    least = sum(group.size * min(_costs(decisions[group.name])) for group in counted(groups, decisions))
    total = _UNITS * sum(group.size for group in counted(groups, decisions))
    if least > bits * total:
        possible = math.ceil(least / total * 1000) / 1000
        raise UserError(
            f"--effective_bits: {bits:g} cannot be reached: the least possible here is {possible:g} bits per weight"
        )


def mix(
    groups: Sequence[Group],
    decisions: Mapping[str, Decision],
    losses: Mapping[str, Mapping[Choice, float]],
    bits: float,
) -> dict[str, Choice]:
    """Choose formats with the least sum of losses within a budget that `check_budget` accepts.

    Args:
        groups: all of the network's.
        decisions: of all groups; those without a choice are searched.
        losses: of the searched groups, by name and candidate, in nats per token.
        bits: see `check_budget`.

    Returns:
        What becomes of each group, by name.
    """
    choices: dict[str, Choice] = {
        name: decision.choice for name, decision in decisions.items() if decision.choice is not None
    }
    members = counted(groups, decisions)
    budget = math.floor(bits * _UNITS * sum(group.size for group in members))
    budget -= sum(_cost(group, choices[group.name]) for group in members if group.name in choices)
    searched = [group for group in groups if group.name not in choices]
    options = [
        [
            *(Option(_cost(group, choice), losses[group.name][choice]) for choice in CANDIDATES),
            Option(_cost(group, "bf16"), 0.0),
        ]
        for group in searched
    ]
    for group, index in zip(searched, choose(options, budget), strict=True):
        choices[group.name] = (*CANDIDATES, "bf16")[index]
    return {group.name: choices[group.name] for group in groups}


def _cost(group: Group, choice: Choice) -> int:
    return group.size * int(BITS[choice] * _UNITS)


def _costs(decision: Decision) -> list[int]:
    choices = CANDIDATES if decision.choice is None else (decision.choice,)
    return [int(BITS[choice] * _UNITS) for choice in choices]
