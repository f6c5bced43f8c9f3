"""What MFU is measured against: data sheets by name, measurements elsewhere, mixed formats by their shares."""

import time

import pytest
import torch

import callbacks.peak
from callbacks.peak import Peak, combine, find_peak, format_shares, measure_peak
from modules.backbone.flops import MTP, matmul_flops
from modules.backbone.model import Network
from modules.precision.recipe import PrecisionConfig, PrecisionRule, assign_formats
from tests.modules.helpers import tiny_config

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 66.9),
        ("NVIDIA H100 PCIe", 756, 51.2),
        ("NVIDIA H200", 989, 67),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA L4", 121, 30.3),
    ],
)
def test_a_known_gpu_has_its_data_sheets_peak(monkeypatch, name: str, bf16: float, fp32: float):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(callbacks.peak, "measure_peak", lambda *_: pytest.fail("measured"))
    assert find_peak(CUDA, "bf16").flops == pytest.approx(bf16 * 1e12)
    assert find_peak(CUDA, "fp32").flops == pytest.approx(fp32 * 1e12)
    assert "data sheet" in find_peak(CUDA, "bf16").source


@pytest.mark.parametrize("name", ["NVIDIA H20", "NVIDIA A10", "Tesla T4", "NVIDIA L40", "AMD Instinct MI300X"])
def test_an_unknown_gpu_is_measured(monkeypatch, name: str):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    measured = Peak(5e12, "measured")
    monkeypatch.setattr(callbacks.peak, "measure_peak", lambda device, number_format: measured)
    assert find_peak(CUDA, "bf16") is measured


def test_a_format_without_a_figure_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    measured = Peak(5e12, "measured")
    monkeypatch.setattr(callbacks.peak, "measure_peak", lambda device, number_format: measured)
    assert find_peak(CUDA, "bf16").flops == 165.2e12
    assert find_peak(CUDA, "fp8") is measured


def test_a_cpu_has_no_peak_that_load_could_flatter(monkeypatch):
    monkeypatch.setattr(callbacks.peak, "measure_peak", lambda *_: pytest.fail("measured"))
    assert find_peak(torch.device("cpu"), "fp32") is None


def test_a_measurement_is_a_speed_this_machine_has_and_draws_no_numbers_of_the_run(monkeypatch):
    state = torch.get_rng_state()
    monkeypatch.setitem(callbacks.peak.SIZES, "cpu", 256)
    measured = measure_peak(torch.device("cpu"), "fp32")
    assert measured.source == "measured with matrices of 256 x 256"
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(256, 256)
    seconds = [0.0] * 20
    for number in range(20):
        start = time.perf_counter()
        x @ x
        seconds[number] = time.perf_counter() - start
    assert measured.flops > 0.3 * 2 * 256**3 / min(seconds)


def test_the_shares_of_the_formats_are_those_of_their_flops():
    """Against the closed formulas of the FLOPs, which know nothing of modules."""
    config = tiny_config()
    network = Network(config)
    rules = [PrecisionRule(pattern="lm_head", format="fp32"), PrecisionRule(pattern="*.experts.*", format="fp32")]
    assign_formats(PrecisionConfig(recipe="super", rules=rules), network)
    counts = {part: count.total for part, count in matmul_flops(config, 16, 2).items()}
    no_format = ("scan", "scores", "router", "combine")
    counts = {part: count for part, count in counts.items() if not part.endswith(no_format)}
    fp32 = sum(count for part, count in counts.items() if part.removeprefix(MTP) in ("head", "MoE routed experts"))
    shares = format_shares(network, mtp_depths=2)
    assert shares["fp32"] == pytest.approx(fp32 / sum(counts.values()))
    assert sum(shares.values()) == pytest.approx(1)


def test_one_format_has_the_whole_share():
    network = Network(tiny_config(num_nextn_predict_layers=0))
    assert format_shares(network, 0) == {"fp32": 1.0}


def test_mixed_formats_take_the_time_of_their_parts():
    peaks = {"bf16": Peak(4.0, ""), "fp32": Peak(1.0, "")}
    assert combine({"bf16": 0.8, "fp32": 0.2}, peaks) == pytest.approx(1 / (0.8 / 4 + 0.2 / 1))
    assert combine({"bf16": 1.0}, {"bf16": Peak(4.0, "")}) == pytest.approx(4.0)
