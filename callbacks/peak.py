"""How many FLOP/s a device could do at best, in each number format: what MFU is measured against.

For a GPU in the table it is the data sheet's figure for dense matrices; for any other device it is measured at the
start with large matrix products. A guess would look like a fact.
"""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from modules.precision.formats import COMPUTE_DTYPE, QUANTIZED, Format
from modules.precision.linear import FormattedModule
from modules.precision.table import work_shares

DATA_SHEETS: tuple[tuple[str, dict[Format, float]], ...] = (
    # Beginning of the name that torch.cuda.get_device_name returns, after "NVIDIA "; the first that fits counts, so the
    # longer names come first. Figures in 1e12 FLOP/s.
    # bf16: tensor cores, dense, sums in fp32 (half of what a sheet gives "with sparsity"); source: the table of data
    # sheet figures in nanochat (karpathy/nanochat, nanochat/common.py).
    # fp32: without TF32, which torch leaves off; source: the table in lightning.fabric.utilities.throughput, which
    # names the sheets. Where no source was at hand the format is left out, and measured.
    ("GB200", {"bf16": 2500}),
    ("B200", {"bf16": 2250}),
    ("H200 NVL", {"bf16": 836, "fp32": 60}),
    ("H200", {"bf16": 989, "fp32": 67}),
    ("H100 NVL", {"bf16": 835}),
    ("H100 PCIe", {"bf16": 756, "fp32": 51.2}),
    ("H100", {"bf16": 989, "fp32": 66.9}),
    ("A100", {"bf16": 312, "fp32": 19.5}),
    ("L40S", {"bf16": 362}),
    ("L4", {"bf16": 121, "fp32": 30.3}),
    ("GeForce RTX 4090", {"bf16": 165.2, "fp32": 82.6}),
)
SIZES = {"cpu": 512, "cuda": 4096}
"""Rows and columns of the matrices that are multiplied where the peak is measured."""
MEASURE_SECONDS = 0.5
"""How long products are repeated; the fastest counts."""


@dataclass(frozen=True)
class Peak:
    """The best a device can do in one format."""

    flops: float
    """FLOP/s of one device."""
    source: str
    """Where the figure comes from."""


def find_peak(device: torch.device, number_format: Format) -> Peak:
    """Return the peak of a device: the data sheet's, or measured (takes half a second)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ")
        for beginning, figures in DATA_SHEETS:
            if re.match(rf"{beginning}\b", name) and number_format in figures and "MIG" not in name:
                return Peak(figures[number_format] * 1e12, f"data sheet of {beginning}")
    size = SIZES["cpu" if device.type == "cpu" else "cuda"]
    return Peak(measure_peak(device, number_format, size), f"measured with matrices of {size} x {size}")


def measure_peak(device: torch.device, number_format: Format, size: int) -> float:
    """Return the FLOP/s of the fastest of many products of two square matrices.

    Args:
        device: where to compute.
        number_format: format of the matrices.
        size: their rows and columns.
    """
    generator = torch.Generator(device).manual_seed(0)  # the run's own draws stay what they are
    x, weight = (
        torch.randn(size, size, generator=generator, device=device).to(COMPUTE_DTYPE[number_format]) for _ in range(2)
    )
    fastest = float("inf")
    end = time.perf_counter() + MEASURE_SECONDS
    F.linear(x, weight)  # the first product is slow: kernels are chosen and loaded
    while fastest == float("inf") or time.perf_counter() < end:
        _wait(device)
        start = time.perf_counter()
        F.linear(x, weight)
        _wait(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def format_shares(network: nn.Module, mtp_depths: int) -> dict[Format, float]:
    """Return the share of each format in the FLOPs of the layers that have one.

    Quantised formats count as bf16: emulation multiplies in it, and where hardware does not, a speed is told against
    bf16 all the same, as is usual. Attention scores and the scan, which have no weights, are taken to be spread like
    the rest.

    Args:
        network: with the precision recipe applied.
        mtp_depths: M.
    """
    shares: dict[Format, float] = {}
    for name, share in work_shares(network, mtp_depths).items():
        module = network.get_submodule(name)
        assert isinstance(module, FormattedModule)
        chosen: Format = "bf16" if module.format in QUANTIZED else module.format
        shares[chosen] = shares.get(chosen, 0.0) + share
    return {number_format: part for number_format, part in shares.items() if part}


def combine(shares: Mapping[Format, float], peaks: Mapping[Format, Peak]) -> float:
    """Return the FLOP/s of a device that does each format's share of the work at that format's peak.

    The times add up, so it is the harmonic mean, weighted by the shares.
    """
    return 1 / sum(share / peaks[number_format].flops for number_format, share in shares.items())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
