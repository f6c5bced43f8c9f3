"""The recipe as a table for the user: which modules compute what in which format, where, how much of the work.

Most surprising numbers come from a format that nobody looked at.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from modules.precision.adapter import Adapter
from modules.precision.linear import FormattedModule, GroupedLinear, Head, Linear
from modules.precision.recipe import Assignment, quantized_schemes
from modules.precision.scheme import Products

_NUMBERS = ("modules", "FLOPs")
_ADAPTER_NUMBERS = ("modules", "weights", "adapters", "share")
_NOTE = (
    "FLOPs: of all products with weights; norms, routers, convolutions, A_log, D and dt_bias",
    "compute in fp32, and weights are kept in fp32",
)


class Group(NamedTuple):
    """Modules that a recipe treats alike."""

    module: str
    """Their name, numbers replaced by `*`."""
    pattern: str
    """That decided."""
    products: Products
    """Their formats."""
    backend: str
    """What computes; `torch` where nothing is quantised."""


def precision_groups(table: Sequence[Assignment], network: nn.Module, mtp_depths: int) -> dict[Group, list[float]]:
    """Return the shares of the modules of each group in the FLOPs of `work_shares`, in module order.

    Args:
        table: from `recipe.assign_formats`.
        network: the network it was applied to.
        mtp_depths: M.
    """
    work, schemes = work_shares(network, mtp_depths), quantized_schemes(network)
    groups: dict[Group, list[float]] = {}
    for row in table:
        scheme = schemes.get(row.name)
        products = Products.all_in(row.format) if scheme is None else scheme.products
        name, backend = without_numbers(row.name), "torch" if scheme is None else scheme.backend.name
        groups.setdefault(Group(name, row.pattern, products, backend), []).append(work[row.name])
    return groups


def precision_lines(
    table: Sequence[Assignment],
    network: nn.Module,
    mtp_depths: int,
    by_module: bool,
) -> list[str]:
    """Return the table and what is to be known beside it.

    Args:
        table: from `recipe.assign_formats`.
        network: the network it was applied to.
        mtp_depths: M.
        by_module: a row for each kind of module, under the pattern that decided, instead of each pattern.
    """
    groups = precision_groups(table, network, mtp_depths)
    return [*(_by_module(groups) if by_module else _by_pattern(groups)), *_NOTE, *refusal_lines(network)]


def without_numbers(name: str) -> str:
    """Return the name of a module with numbers replaced by `*`."""
    return re.sub(r"\.\d+", ".*", name)


def adapter_lines(network: nn.Module) -> list[str]:
    """Return a table of the adapted layers, and what share of the network's weights they and their adapters are."""
    rows: dict[str, list[Linear | GroupedLinear]] = {}
    for name, module in network.named_modules():
        if isinstance(module, Linear | GroupedLinear) and module.adapter is not None:
            rows.setdefault(without_numbers(name), []).append(module)
    adapted = sum(module.weight.numel() for modules in rows.values() for module in modules)
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    whole = sum(parameter.numel() for parameter in network.parameters()) - trained
    table = []
    for name, modules in rows.items():
        weights = sum(module.weight.numel() for module in modules)
        own = sum(parameter.numel() for module in modules for parameter in _adapter(module).parameters())
        table.append((name, str(len(modules)), f"{weights:,}", f"{own:,}", f"{own / weights:.1%}"))
    return [
        *_align([("adapted layers", *_ADAPTER_NUMBERS), *table]),
        f"adapted: layers with {adapted / whole:.1%} of the network's {whole:,} weights, all frozen",
        f"trained: {trained:,} weights of adapters, {trained / whole:.1%} of as many",
    ]


def _adapter(module: Linear | GroupedLinear) -> Adapter:
    assert module.adapter is not None
    return module.adapter


def _by_pattern(groups: Mapping[Group, Sequence[float]]) -> list[str]:
    rows: dict[tuple[str, ...], list[float]] = {}
    for group, shares in groups.items():
        rows.setdefault((group.pattern, *group.products, group.backend), []).extend(shares)
    names = ("pattern", "fprop", "dgrad", "wgrad", "backend", *_NUMBERS)
    return _align([names, *((*key, *_numbers(shares)) for key, shares in rows.items())])


def _by_module(groups: Mapping[Group, Sequence[float]]) -> list[str]:
    title = "pattern, and modules that it decided"
    rows = [
        (f"  {group.module}", "/".join(dict.fromkeys(group.products)), group.backend, *_numbers(shares))
        for group, shares in groups.items()
    ]
    head, *lines = _align([(title, "format", "backend", *_NUMBERS), *rows])
    under: dict[str, list[str]] = {}
    for group, line in zip(groups, lines, strict=True):
        under.setdefault(group.pattern, []).append(line)
    return [head, *(line for pattern, decided in under.items() for line in (pattern, *decided))]


def refusal_lines(network: nn.Module) -> list[str]:
    """Return why quantised products are not computed by the better backends."""
    return [
        *dict.fromkeys(
            f"{scheme.planned.fprop} not by {name}: {reason}"
            for scheme in quantized_schemes(network).values()
            for name, reason in scheme.refused.items()
        )
    ]


def _numbers(shares: Sequence[float]) -> tuple[str, str]:
    return str(len(shares)), f"{sum(shares):.1%}"


def _align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [name in (*_NUMBERS, *_ADAPTER_NUMBERS) for name in rows[0]]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]


def work_shares(network: nn.Module, mtp_depths: int) -> dict[str, float]:
    """Return the share of each module in the FLOPs of the modules that have a format.

    A product's FLOPs are proportional to the weights that a token is multiplied by: those of the MTP block count once
    for each depth, those of the head once more for each depth.

    Args:
        network: built of modules that have a format.
        mtp_depths: M.
    """
    work: dict[str, int] = {}
    for name, module in network.named_modules():
        if isinstance(module, Head):
            work[name] = module.active * (1 + mtp_depths)
        elif isinstance(module, FormattedModule):
            work[name] = module.active * (mtp_depths if name.startswith("mtp.") else 1)
    total = sum(work.values())
    return {name: active / total for name, active in work.items()}
