"""Scales of fused layers, of experts and of keys and values; coverage of experts."""

import pytest
import torch

from modules.checkpoints.source import open_model
from modules.ptq.calibration import Calibration
from modules.ptq.layers import find_groups
from modules.ptq.weights import FEW_TOKENS, WeightMaker, expert_coverage, kv_scales
from tests.modules.checkpoints.folders import public_tensors, write_hf_folder
from tests.modules.helpers import dequantize_weight, make_network, tiny_config

CONFIG = tiny_config(moe_intermediate_size=32)
GROUPS = find_groups(CONFIG)
LAYER = "backbone.layers.2.mixer"
EXPERTS = "backbone.layers.1.mixer.experts"


@pytest.fixture(scope="module")
def tensors():
    return public_tensors(make_network(CONFIG))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory):
    return open_model(write_hf_folder(tmp_path_factory.mktemp("hf") / "model", make_network(CONFIG)))


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    """Input maxima that tell layers and experts apart; expert 3 of layer 1 saw nothing, expert 5 little."""
    inputs = {}
    for number, layer in enumerate(layer for group in GROUPS for layer in group.layers):
        amax = torch.tensor(float(number + 1))
        inputs[layer.module] = amax if len(layer.weights) == 1 else amax * torch.linspace(0.1, 1, len(layer.weights))
    counts = torch.full((8,), 1000)
    counts[3], counts[5] = 0, FEW_TOKENS - 1
    for kind in ("up_proj", "down_proj"):
        inputs[f"{EXPERTS}.{kind}"][3] = 0
    tokens = {f"{EXPERTS}.{kind}": counts for kind in ("up_proj", "down_proj")}
    tokens |= {f"backbone.layers.5.mixer.experts.{kind}": torch.full((8,), 99) for kind in ("up_proj", "down_proj")}
    return Calibration(inputs, tokens, {LAYER: torch.tensor(3.5)}, {LAYER: torch.tensor(0.25)})


@pytest.fixture(scope="module")
def maker(source, calibration) -> WeightMaker:
    return WeightMaker(source, GROUPS, calibration, "max")


@pytest.mark.parametrize(("choice", "largest"), [("nvfp4", 2688), ("fp8", 448)])
def test_q_k_and_v_share_both_scales(maker, tensors, calibration, choice, largest: int):
    names = [f"{LAYER}.{letter}_proj.weight" for letter in "qkv"]
    made = [maker.make(name, choice) for name in names]
    amax = max(float(tensors[name].abs().max()) for name in names)
    assert len({float(weight.scale) for weight in made}) == 1
    assert float(made[0].scale) == pytest.approx(amax / largest, rel=1e-3)
    inputs = max(float(calibration.inputs[f"{LAYER}.{letter}_proj"]) for letter in "qkv")
    assert len({float(weight.input_scale) for weight in made}) == 1
    assert float(made[0].input_scale) == pytest.approx(inputs / largest, rel=1e-3)


def test_layers_that_are_not_fused_have_scales_of_their_own(maker, tensors, calibration):
    for layer in (f"{LAYER}.o_proj", "backbone.layers.0.mixer.in_proj", "backbone.layers.3.mixer.down_proj"):
        made = maker.make(f"{layer}.weight", "nvfp4")
        assert float(made.scale) == pytest.approx(float(tensors[f"{layer}.weight"].abs().max()) / 2688, rel=1e-3)
        assert float(made.input_scale) == pytest.approx(float(calibration.inputs[layer]) / 2688, rel=1e-3)


@pytest.mark.parametrize("kind", ["up_proj", "down_proj"])
def test_experts_share_the_input_scale_and_no_other(maker, tensors, calibration, kind: str):
    """Expert 3, which saw nothing, has the layer's."""
    made = [maker.make(f"{EXPERTS}.{expert}.{kind}.weight", "nvfp4") for expert in range(8)]
    assert {float(weight.input_scale) for weight in made} == {float(made[0].input_scale)}
    largest = float(calibration.inputs[f"{EXPERTS}.{kind}"].max())
    assert float(made[3].input_scale) == pytest.approx(largest / 2688, rel=1e-3)
    for expert, weight in enumerate(made):
        own = float(tensors[f"{EXPERTS}.{expert}.{kind}.weight"].abs().max())
        assert float(weight.scale) == pytest.approx(own / 2688, rel=1e-3)


def test_a_single_expert_is_no_fused_projection(tmp_path):
    """Its two layers have scales of their own, of weights and of inputs."""
    network = make_network(tiny_config(moe_intermediate_size=32, n_routed_experts=1, num_experts_per_tok=1))
    source, tensors = open_model(write_hf_folder(tmp_path / "model", network)), public_tensors(network)
    groups = find_groups(source.config)
    inputs = {f"{EXPERTS}.up_proj": torch.tensor([2.0]), f"{EXPERTS}.down_proj": torch.tensor([5.0])}
    maker = WeightMaker(source, groups, Calibration(inputs, {}, {}, {}), "max")
    for kind in ("up_proj", "down_proj"):
        name = f"{EXPERTS}.0.{kind}.weight"
        made = maker.make(name, "nvfp4")
        assert float(made.scale) == pytest.approx(float(tensors[name].abs().max()) / 2688, rel=1e-3)
        assert float(made.input_scale) == pytest.approx(float(inputs[f"{EXPERTS}.{kind}"]) / 2688, rel=1e-3)


def test_weight_only_needs_no_calibration(source, tensors):
    maker = WeightMaker(source, GROUPS, None, "max")
    name = f"{EXPERTS}.0.up_proj.weight"
    made = maker.make(name, "nvfp4-weight-only")
    assert made.format == "nvfp4"
    assert made.input_scale is None
    error = (dequantize_weight(made) - tensors[name]).square().mean() / tensors[name].square().mean()
    assert 0.001 < error < 0.02


def test_searches_have_less_error_than_maxima(source, tensors):
    name = "backbone.layers.0.mixer.in_proj.weight"

    def error(search) -> float:
        made = WeightMaker(source, GROUPS, None, search).make(name, "nvfp4-weight-only")
        return float((dequantize_weight(made) - tensors[name]).square().mean())

    assert error("mse") < error("four_over_six") < error("max")


def test_scales_of_keys_and_values_are_their_maxima_over_448(calibration):
    keys, values = kv_scales(calibration)[LAYER]
    assert keys == pytest.approx(3.5 / 448, rel=1e-3)
    assert values == pytest.approx(0.25 / 448, rel=1e-3)
    assert keys >= 3.5 / 448


def test_experts_that_calibration_did_not_reach_are_named(calibration):
    choices = {group.name: "nvfp4" for group in GROUPS}
    first, second = expert_coverage(GROUPS, choices, calibration)
    assert (first.layer, first.unreached, first.few) == (f"{EXPERTS}.*", [3], [5])
    assert first.tokens == [1000, 1000, 1000, 0, 1000, FEW_TOKENS - 1, 1000, 1000]
    assert (second.layer, second.unreached, second.few) == ("backbone.layers.5.mixer.experts.*", [], [])
    weight_only = choices | {f"{EXPERTS}.*": "nvfp4-weight-only"}
    assert [row.layer for row in expert_coverage(GROUPS, weight_only, calibration)] == [second.layer]
