"""What GPUs can do by the book: peak of each number format, memory, compute capability.

One table for all who ask: MFU is measured against the peaks, `plan` judges memory, formats and time by it, backends
judge formats by the compute capability.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from modules.precision.formats import Format

CAPABILITY: dict[Format, tuple[int, int]] = {"fp8": (8, 9), "mxfp8": (10, 0), "nvfp4": (10, 0)}
"""Compute capability from which tensor cores multiply in a format (Transformer Engine's and torchao's checks)."""


@dataclass(frozen=True, kw_only=True)
class GPU:
    """A kind of GPU."""

    name: str
    """Beginning of the name that torch.cuda.get_device_name returns, after "NVIDIA "."""
    capability: tuple[int, int]
    """CUDA compute capability."""
    peaks: Mapping[Format, float]
    """Dense matrix products in 1e12 FLOP/s; a format without a source is left out."""
    memory_mib: int | None = None
    """What nvidia-smi shows in all, with ECC; None: no source at hand."""


# Peaks. bf16: tensor cores, dense (half of what a sheet gives "with sparsity"), sums in fp32; data sheets by the table
# in karpathy/nanochat (nanochat/common.py). fp32: without TF32, which torch leaves off; the table in
# lightning.fabric.utilities.throughput, which names the sheets. fp8 (twice bf16 on each sheet), mxfp8 (as fp8), nvfp4
# and all of Blackwell: NVIDIA's sheets of HGX B200, GB200 NVL72, GB300 NVL72 (of a rack of 72: 1,080 PFLOP/s of dense
# FP4, 360 of FP8, 180 of bf16) and L40S.
# Memory: total of nvidia-smi in published listings (81559MiB, 143771MiB, ...). Capability: NVIDIA's list of CUDA GPUs.
GPUS = (
    # The first whose name fits counts, so the longer names come first.
    GPU(
        name="GB300",
        capability=(10, 3),
        peaks={"bf16": 2500, "fp32": 80, "fp8": 5000, "mxfp8": 5000, "nvfp4": 15_000},
        memory_mib=284_208,
    ),
    GPU(
        name="GB200",
        capability=(10, 0),
        peaks={"bf16": 2500, "fp32": 80, "fp8": 5000, "mxfp8": 5000, "nvfp4": 10_000},
        memory_mib=189_471,
    ),
    GPU(
        name="B200",
        capability=(10, 0),
        peaks={"bf16": 2250, "fp32": 75, "fp8": 4500, "mxfp8": 4500, "nvfp4": 9000},
        memory_mib=183_359,
    ),
    GPU(name="H200 NVL", capability=(9, 0), peaks={"bf16": 836, "fp32": 60, "fp8": 1671}, memory_mib=143_771),
    GPU(name="H200", capability=(9, 0), peaks={"bf16": 989, "fp32": 67, "fp8": 1979}, memory_mib=143_771),
    GPU(name="H100 NVL", capability=(9, 0), peaks={"bf16": 835, "fp8": 1671}),
    GPU(name="H100 PCIe", capability=(9, 0), peaks={"bf16": 756, "fp32": 51.2, "fp8": 1513}, memory_mib=81_559),
    GPU(name="H100", capability=(9, 0), peaks={"bf16": 989, "fp32": 66.9, "fp8": 1979}, memory_mib=81_559),
    GPU(name="A100", capability=(8, 0), peaks={"bf16": 312, "fp32": 19.5}, memory_mib=81_920),
    GPU(name="L40S", capability=(8, 9), peaks={"bf16": 362, "fp32": 91.6, "fp8": 733}, memory_mib=46_068),
    GPU(name="L4", capability=(8, 9), peaks={"bf16": 121, "fp32": 30.3}),
    GPU(name="GeForce RTX 4090", capability=(8, 9), peaks={"bf16": 165.2, "fp32": 82.6}),
)
"""The kinds with known figures."""


def find_gpu(device_name: str) -> GPU | None:
    """Return the kind of a GPU by what torch.cuda.get_device_name returns; None: unknown, or a slice (MIG) of one."""
    name = device_name.removeprefix("NVIDIA ")
    if "MIG" in name:
        return None
    return next((gpu for gpu in GPUS if re.match(rf"{gpu.name}\b", name)), None)


def format_refusal(chosen: Format, capability: tuple[int, int]) -> str:
    """Return why a GPU of a compute capability does not multiply in a quantised format; empty: it does."""
    needed = CAPABILITY[chosen]
    return "" if capability >= needed else f"{chosen} needs a GPU of compute capability {needed[0]}.{needed[1]}"
