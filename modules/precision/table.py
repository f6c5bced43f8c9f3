"""The recipe as a table for the user: which modules compute what in which format, where, how much of the work.

Most surprising numbers come from a format that nobody looked at.
"""

import re
from collections.abc import Sequence

from torch import nn

from modules.precision.linear import FormattedModule, Head
from modules.precision.recipe import Assignment, quantized_schemes

_NUMBERS = ("modules", "FLOPs")


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
        by_module: a row for each kind of module instead of each pattern of the recipe.
    """
    work, schemes = work_shares(network, mtp_depths), quantized_schemes(network)
    groups: dict[tuple[str, ...], list[float]] = {}
    for row in table:
        scheme = schemes.get(row.name)
        products = (row.format,) * 3 if scheme is None else scheme.products
        backend = "torch" if scheme is None else scheme.backend.name
        name = re.sub(r"\.\d+", ".*", row.name)
        key = (name, *products, backend, row.pattern) if by_module else (row.pattern, *products, backend)
        groups.setdefault(key, []).append(work[row.name])
    names = ["module" if by_module else "pattern", "fprop", "dgrad", "wgrad", "backend"]
    rows = [(*names, *_NUMBERS, *(["decided by"] if by_module else []))]
    rows += [
        (*key[: len(names)], str(len(shares)), f"{sum(shares):.1%}", *key[len(names) :])
        for key, shares in groups.items()
    ]
    refused = {
        f"{scheme.planned.fprop} not by {name}: {reason}": None
        for scheme in schemes.values()
        for name, reason in scheme.refused.items()
    }
    return [
        *_align(rows),
        "FLOPs: of all products with weights; norms, routers, convolutions, A_log, D and dt_bias",
        "compute in fp32, and weights are kept in fp32",
        *refused,
    ]


def _align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [name in _NUMBERS for name in rows[0]]
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
