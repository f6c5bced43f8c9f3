"""The recipe as a table for the user: which modules compute what in which format, where, how much of the work.

Most surprising numbers come from a format that nobody looked at.
"""

import re
from collections.abc import Sequence
from typing import cast

from torch import nn

from modules.precision.linear import Embedding, FormattedModule, GroupedLinear, Head
from modules.precision.recipe import Assignment, quantized_schemes

_NUMBERS = ("modules", "FLOPs")


def precision_lines(
    table: Sequence[Assignment],
    network: nn.Module,
    top_k: int,
    experts: int,
    mtp_depths: int,
    by_module: bool,
) -> list[str]:
    """Return the table and what is to be known beside it.

    Args:
        table: from `recipe.apply`.
        network: the network it was applied to.
        top_k: K, experts per token; 0 without experts.
        experts: E.
        mtp_depths: M.
        by_module: a row for each kind of module instead of each pattern of the recipe.
    """
    work = work_shares(network, top_k, experts, mtp_depths)
    groups: dict[tuple[str, ...], list[float]] = {}
    for row in table:
        scheme = cast(FormattedModule, network.get_submodule(row.name)).scheme
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
        for scheme in quantized_schemes(network).values()
        for name, reason in scheme.refused.items()
    }
    return [
        *_align(rows),
        "FLOPs: of all products with weights; norms, routers, convolutions, A_log, D and dt_bias compute in fp32, and",
        "weights are kept in fp32",
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


def work_shares(network: nn.Module, top_k: int, experts: int, mtp_depths: int) -> dict[str, float]:
    """Return the share of each module in the FLOPs of the modules that have a format.

    A product's FLOPs are proportional to the weights that a token meets: those of an expert count K / E, those of the
    MTP block once for each depth, those of the head once more for each depth.

    Args:
        network: built of modules that have a format.
        top_k: K, experts per token; 0 without experts.
        experts: E.
        mtp_depths: M.
    """
    work: dict[str, float] = {}
    for name, module in network.named_modules():
        if not isinstance(module, FormattedModule):
            continue
        active = 0.0 if isinstance(module, Embedding) else module.weight.numel()  # pyright: ignore[reportCallIssue]
        if isinstance(module, GroupedLinear):
            active *= top_k / experts
        if isinstance(module, Head):
            active *= 1 + mtp_depths
        elif name.startswith("mtp."):
            active *= mtp_depths
        work[name] = active
    total = sum(work.values())
    return {name: active / total for name, active in work.items()}
