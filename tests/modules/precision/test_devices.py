"""The table of GPUs against itself: figures that follow from each other, and names as torch gives them."""

import pytest

from modules.precision.devices import GPUS, find_gpu, format_refusal


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_a_format_has_a_peak_only_where_the_hardware_has_the_format(gpu):
    for chosen in ("fp8", "mxfp8", "nvfp4"):
        assert chosen not in gpu.peaks or format_refusal(chosen, gpu.capability) == ""
    if gpu.memory_mib is not None:  # what plan knows, it knows whole
        lacks = {chosen for chosen in ("fp8", "mxfp8", "nvfp4") if not format_refusal(chosen, gpu.capability)}
        assert {"bf16", "fp32", *lacks} == gpu.peaks.keys()


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_each_halving_of_the_bits_doubles_the_peak(gpu):
    if "fp8" in gpu.peaks:
        assert gpu.peaks["fp8"] == pytest.approx(2 * gpu.peaks["bf16"], rel=0.03)
    if "nvfp4" in gpu.peaks:
        assert gpu.peaks["mxfp8"] == gpu.peaks["fp8"]
        assert gpu.peaks["nvfp4"] >= 2 * gpu.peaks["fp8"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A1000", None),
        ("Tesla T4", None),
    ],
)
def test_names_of_torch(name: str, found: str | None):
    gpu = find_gpu(name)
    assert (gpu.name if gpu else None) == found
