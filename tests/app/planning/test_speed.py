"""How many devices a run file asks for, and folders without a speed."""

from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.utilities import device_parser

from app.planning.speed import device_count, measured_speed
from app.run_folder import RunFolder
from modules.errors import UserError


def test_a_folder_without_a_speed(tmp_path: Path) -> None:
    reason = measured_speed(RunFolder(tmp_path, "run"), "")
    assert reason == f"{tmp_path / 'run'} has not been trained"


@pytest.mark.parametrize("given", [1, 3, "3", " 3 ", [0, 1], [5], "0,1", "0, 1", "2,", "0,1,2,"])
def test_devices_are_counted_as_lightning_does(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_parser, "_get_all_available_gpus", lambda **_: [*range(8)])
    expected = device_parser._parse_gpu_ids(given, include_cuda=True)
    assert expected is not None
    assert device_count({"devices": given}) == len(expected)


@pytest.mark.parametrize("given", ["auto", -1, "-1"])
def test_all_devices_are_not_counted(given: Any) -> None:
    assert device_count({"devices": given}) is None


@pytest.mark.parametrize("given", [0, "0", [], -2, "two", "", "0,b"])
def test_no_devices_are_refused(given: Any) -> None:
    with pytest.raises(UserError, match=r"trainer\.devices: .* asks for no device"):
        device_count({"devices": given})
