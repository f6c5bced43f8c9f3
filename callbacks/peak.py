"""How many FLOP/s a device could do at best, in each number format: what MFU is measured against.

For a GPU in the table of `modules/precision/devices.py` it is the data sheet's figure for dense matrices; any other GPU
is measured at the start with large matrix products: a guess would look like a fact. A CPU has no such figure, and its
runs no MFU: its data sheet has none, and what is measured there is too low as soon as other programs compute, which
doubled MFU at the same speed.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from modules.precision.devices import find_gpu
from modules.precision.formats import COMPUTE_DTYPE, QUANTIZED, Format
from modules.precision.linear import FormattedModule
from modules.precision.table import work_shares

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


def find_peak(device: torch.device, number_format: Format) -> Peak | None:
    """Return the peak of a GPU: the data sheet's, or measured (takes half a second); None on a CPU."""
    if device.type == "cpu":
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    if gpu is not None and number_format in gpu.peaks:
        return Peak(gpu.peaks[number_format] * 1e12, f"data sheet of {gpu.name}")
    return measure_peak(device, number_format)


def measure_peak(device: torch.device, number_format: Format) -> Peak:
    """Return the FLOP/s of the fastest of many products of two square matrices (see `SIZES`).

    Args:
        device: where to compute.
        number_format: format of the matrices.
    """
    size = SIZES[device.type]
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
    return Peak(2 * size**3 / fastest, f"measured with matrices of {size} x {size}")


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
