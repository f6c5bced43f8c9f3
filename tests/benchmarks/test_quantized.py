"""The sides of the benchmark are one model in the formats that their names say, and ratios are those of speeds."""

from benchmarks import generation, quantized, training_step
from modules.checkpoints.load import load_model
from modules.precision.linear import FormattedModule
from tests.modules.helpers import tiny_config


def test_sides_are_one_model_in_the_formats_of_their_names(monkeypatch) -> None:
    monkeypatch.setattr(training_step, "CONFIG", tiny_config(num_nextn_predict_layers=0))
    kinds = {}
    with generation.staged(None, "fp32") as folder, quantized.folders(folder, 64) as made:
        for name, place in made.items():
            network = load_model(place).network
            kinds[name] = {module.format for module in network.modules() if isinstance(module, FormattedModule)}
    assert kinds.pop("nvfp4 and fp8") == {"nvfp4", "fp8", "bf16"}
    assert kinds.pop("nvfp4-weight-only") == {"nvfp4", "bf16"}
    assert kinds.pop("nvfp4") == {"nvfp4", "bf16"}
    assert kinds == {"fp32": {"fp32"}, "bf16": {"bf16"}, "fp8": {"fp8", "bf16"}}


def test_half_the_seconds_are_twice_the_speed() -> None:
    seconds = {"fp32": [2.0, 4.0, 6.0], "bf16": [1.0, 1.0, 1.0], "fp8": [1.0, 2.0, 3.0]}
    assert quantized._ratio(seconds, "fp8", "fp32") == 2.0
    assert quantized._ratios(seconds, "fp8").split() == ["2.00x", "0.50x"]
