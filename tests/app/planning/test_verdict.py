"""Speed from a share of the peak, memory with what is not counted, and the devices that would do."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from app.planning.devices import KINDS, Device, choose_device, kinds, machine_memory
from app.planning.memory import StepMemory
from app.planning.verdict import Work, assume_speed, emulated_formats, fitting_devices, judge_memory
from callbacks.peak import Peak
from modules.backbone.model import Network
from modules.errors import UserError
from modules.precision.recipe import PrecisionConfig, PrecisionRule, assign_formats
from tests.modules.helpers import tiny_config

GIB = 2**30
WORK = Work(tokens=10**9, flops_per_token=1e6, mtp_depths=0)
ON = {device.name: device for device in kinds()}


def network(chosen: str, device: Device) -> Network:
    """All linear layers in a format, the rest of the products in bf16."""
    with torch.device("meta"):
        built = Network(tiny_config(num_nextn_predict_layers=0))
    rules = [PrecisionRule(pattern="*.layers.*", format=chosen)]  # pyright: ignore[reportArgumentType]
    config = PrecisionConfig(recipe="bf16", rules=rules, bf16_tail=0)
    assign_formats(config, built, device.kind, device.capability)
    return built


def test_a_stated_share_is_of_the_peak_and_an_assumed_one_says_so():
    built = network("bf16", ON["H100"])
    stated = assume_speed(built, WORK, ON["H100"], 8, 0.4, None)
    assert stated.tokens_per_second == pytest.approx(8 * 0.4 * 989e12 / 1e6)
    assert (stated.basis, stated.source) == ("stated", "0.4 of 989 TFLOP/s, data sheet")
    assumed = assume_speed(built, WORK, ON["H100"], 8, None, None)
    assert assumed.tokens_per_second == pytest.approx(stated.tokens_per_second / 2)
    assert assumed.source == "assumed: 0.2 of 989 TFLOP/s, data sheet"
    own = assume_speed(built, WORK, ON["H100"], 8, None, 100)
    assert own.tokens_per_second == pytest.approx(8 * 0.2 * 100e12 / 1e6)
    assert own.source == "assumed: 0.2 of 100 TFLOP/s, stated"


@pytest.mark.parametrize(("name", "faster"), [("A100", False), ("L40S", True), ("H100", True), ("B200", True)])
def test_fp8_saves_time_where_tensor_cores_have_it(name: str, faster: bool):
    plain, few = (assume_speed(network(chosen, ON[name]), WORK, ON[name], 1, None, None) for chosen in ("bf16", "fp8"))
    gain = few.tokens_per_second / plain.tokens_per_second
    assert (gain > 1) is faster
    assert gain < 1 / (1 - 0.2 / 2), "of the fifth of a step that products take, at most half is saved"
    assert ("products in few bits" in few.source) is faster
    stated = assume_speed(network("fp8", ON[name]), WORK, ON[name], 1, 0.2, None)
    assert stated.tokens_per_second == pytest.approx(plain.tokens_per_second), "MFU is told against bf16"


def test_layers_whose_sizes_do_not_fit_the_kernels_are_emulated():
    assert emulated_formats(network("nvfp4", ON["H100"])) == ["nvfp4"]
    with torch.device("meta"):
        layers = torch.nn.ModuleDict({"a": Network(tiny_config(num_nextn_predict_layers=0)).lm_head})
    assert emulated_formats(layers) == []


def step(shards: int, rest: int) -> StepMemory:
    """A step that holds `shards` bytes of what is spread over devices, and `rest` of other things."""
    names = [field.name for field in dataclasses.fields(StepMemory)]
    return StepMemory(**dict.fromkeys(names, 0) | {"weights": shards, "forward_peak": rest})


def test_memory_has_room_for_what_is_not_counted():
    fit = judge_memory(step(40 * GIB, 20 * GIB), ON["H100"])
    assert fit.counted == 60 * GIB
    assert fit.allowance == 11 * GIB, "15% and 2 GiB"
    assert fit.fits
    assert not judge_memory(step(48 * GIB, 20 * GIB), ON["H100"]).fits, "68 GiB of 79.6 counted, 80.2 needed"


@pytest.mark.parametrize(
    ("rest", "possible", "expected"),
    [
        (20, [1, 2, 3, 4, 6, 8, 16, 24, 32], 24),  # 79.6 - 2 - 1.15 x 20 leaves 54.6 for 1,150 / n
        (20, [1, 2, 4, 8, 16, 32], 32),
        (50, [*range(8, 129, 8)], 64),  # 20.1 for 1,150 / n, known after the first trial
        (20, [1, 2, 4, 8, 16, 25], None),  # more than a machine, but no whole ones
        (70, [1, 2, 4, 8, 16, 32, 64], None),  # that alone does not fit
    ],
)
def test_the_devices_that_would_do_are_tried(rest: int, possible: list[int], expected: int | None):
    tried: list[int] = []

    def measure(count: int) -> StepMemory:
        tried.append(count)
        return step(1000 * GIB // count, rest * GIB)

    found = fitting_devices(measure, measure(1), ON["H100"], 1, possible)
    assert (found[0] if found else None) == expected
    assert expected is None or tried[-1] == expected
    assert len(tried) <= 4


@pytest.mark.parametrize("name", ["H100", "h100", " H100 ", "NVIDIA H100"])
def test_names_are_read_in_any_case(name: str):
    device, notes = choose_device(name, None, "auto", 1)
    assert (device.name, device.capability, notes) == ("H100", (9, 0), [])


@pytest.mark.parametrize("name", ["H1000", "", "cpu", "h", "V100"])
def test_an_unknown_name_is_answered_with_the_known_ones(name: str):
    with pytest.raises(UserError, match=r"--device: .* is not known; choose one of ") as raised:
        choose_device(name, None, "auto", 1)
    assert all(gpu.name in str(raised.value) for gpu in KINDS.values())
    assert str(raised.value).endswith(", this")


@pytest.mark.parametrize(
    ("name", "accelerator", "given"), [(None, None, "auto"), ("this", None, "gpu"), ("THIS", "gpu", "cpu")]
)
@pytest.mark.parametrize(("model", "bf16"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A10", 1e12)])
def test_a_gpu_of_this_machine_has_its_own_memory_and_a_measured_peak_where_no_sheet_has_it(
    name: str | None, accelerator: Any, given: str, model: str, bf16: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: model)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=22 * GIB))
    monkeypatch.setattr("app.planning.devices.measure_peak", lambda device, number_format: Peak(1e12, ""))
    device, notes = choose_device(name, accelerator, given, 8)
    assert (device.name, device.kind, device.memory, notes) == (model, "cuda", 22 * GIB, [])
    assert device.capability is None, "this machine decides on formats"
    assert device.peak("bf16").flops == bf16


def test_a_container_has_the_memory_it_may_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = machine_memory()
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("app.planning.devices._LIMITS", (limit,))
    for text, expected in (("max\n", whole), ("1073741824\n", GIB)):
        limit.write_text(text, encoding="ascii")
        assert machine_memory() == expected
