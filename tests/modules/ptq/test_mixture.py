"""Sensitivities by hand, and mixtures that keep to their budget."""

import itertools
import random

import pytest
import torch

from modules.backbone.model import Network
from modules.checkpoints.source import open_model
from modules.errors import UserError
from modules.precision.quantized_product import install
from modules.ptq.calibration import calibrate
from modules.ptq.layers import BITS, Rule, counted, decide, effective_bits, find_groups
from modules.ptq.mixture import CANDIDATES, check_budget, mix
from modules.ptq.sensitivity import measure
from modules.ptq.weights import WeightMaker
from tests.modules.checkpoints.folders import write_hf_folder
from tests.modules.helpers import make_network, tiny_config

CONFIG = tiny_config(moe_intermediate_size=32, moe_shared_expert_intermediate_size=48, num_nextn_predict_layers=0)
GROUPS = find_groups(CONFIG)
SEARCHED = decide(GROUPS, None, [], [], CONFIG)
ROWS = [
    torch.randint(0, 64, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (23, 40, 31)
]


def sharp_network() -> Network:
    """A network sure of itself: with a flat distribution both directions of KL are the same number."""
    network = make_network(CONFIG).eval()
    with torch.no_grad():
        network.lm_head.weight *= 8
    return network


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory):
    """A network and what makes its quantised weights."""
    network = sharp_network()
    source = open_model(write_hf_folder(tmp_path_factory.mktemp("hf") / "model", network))
    modules = [layer.module for group in GROUPS for layer in group.layers]
    calibration = calibrate(network, ROWS, modules, keys_and_values=False, batch_tokens=64, advance=lambda _: None)
    return network, WeightMaker(source, GROUPS, calibration, "max")


def measured(network, maker, groups, advance=lambda _: None):
    return measure(network, groups, CANDIDATES, maker.make, ROWS, batch_tokens=64, advance=advance)


@torch.no_grad()
def full_logits(network) -> torch.Tensor:
    return torch.cat([network.logits(network(torch.tensor([row])).hidden)[0] for row in ROWS]).double()


@pytest.mark.parametrize("name", ["backbone.layers.2.mixer.[qkv]_proj", "backbone.layers.1.mixer.experts.*"])
def test_sensitivity_is_the_mean_kl_of_the_network_with_that_group_quantised(setting, name: str):
    network, maker = setting
    group = next(group for group in GROUPS if group.name == name)
    found = measured(network, maker, [group])[name]
    p = full_logits(network).log_softmax(-1)
    for choice in CANDIDATES:
        changed = sharp_network()
        for layer in group.layers:
            install(changed.get_submodule(layer.module), [maker.make(weight, choice) for weight in layer.weights])
        q = full_logits(changed).log_softmax(-1)
        expected = float((p.exp() * (p - q)).sum(-1).mean())
        other_way = float((q.exp() * (q - p)).sum(-1).mean())
        assert found[choice] == pytest.approx(expected, rel=1e-3, abs=2e-8)
        if choice == "nvfp4":
            assert found[choice] != pytest.approx(other_way, rel=2e-3)
    assert 0 < found["fp8"] < found["nvfp4"]


def test_the_network_comes_back_as_it_was_and_progress_counts_every_pass(setting):
    network, maker = setting
    before, seen = full_logits(network), []
    groups = GROUPS[:3]
    measured(network, maker, groups, seen.append)
    assert torch.equal(full_logits(network), before)
    assert sum(seen) == (1 + 2 * len(groups)) * sum(map(len, ROWS))


def losses(seed: int = 0) -> dict[str, dict[str, float]]:
    generator = random.Random(seed)
    drawn = {}
    for group in GROUPS:
        loss = generator.lognormvariate(0, 2)
        drawn[group.name] = {"nvfp4": loss, "fp8": loss * generator.random() * 0.2}
    return drawn


def test_a_budget_of_16_keeps_everything_and_one_of_4_5_nothing():
    assert set(mix(GROUPS, SEARCHED, losses(), 16).values()) == {"bf16"}
    assert set(mix(GROUPS, SEARCHED, losses(), 4.5).values()) == {"nvfp4"}


@pytest.mark.parametrize("bits", [4.5, 4.75, 5, 6.3, 8, 12])
def test_the_mixture_is_the_best_within_the_budget(bits: float):
    """Against trying all mixtures of the seven largest groups, the others being kept by a rule."""
    chosen = sorted(GROUPS, key=lambda group: -group.size)[:7]
    rules = [Rule(group.name, "nvfp4") for group in GROUPS if group not in chosen]
    decisions = decide(GROUPS, None, rules, [], CONFIG)
    drawn = losses(1)
    found = mix(GROUPS, decisions, drawn, bits)
    assert all(found[rule.pattern] == "nvfp4" for rule in rules)
    assert effective_bits(GROUPS, found) <= bits
    best = float("inf")
    for choices in itertools.product((*CANDIDATES, "bf16"), repeat=len(chosen)):
        trial = found | {group.name: choice for group, choice in zip(chosen, choices, strict=True)}
        if effective_bits(GROUPS, trial) <= bits:
            loss = sum(drawn[group.name].get(trial[group.name], 0.0) for group in chosen)
            best = min(best, loss)
    assert sum(drawn[group.name].get(found[group.name], 0.0) for group in chosen) == pytest.approx(best)


def test_more_bits_never_lose_more():
    drawn = losses(2)

    def loss(bits: float) -> float:
        return sum(drawn[name].get(choice, 0.0) for name, choice in mix(GROUPS, SEARCHED, drawn, bits).items())

    found = [loss(bits) for bits in (4.5, 4.6, 5, 6, 8, 11, 16)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == 0


def test_an_unattainable_budget_names_the_least_possible():
    with pytest.raises(
        ValueError, match=r"--effective_bits: 4\.4 cannot be reached: the least possible here is 4\.5 bits"
    ):
        check_budget(GROUPS, SEARCHED, 4.4)
    kept = decide(GROUPS, None, [Rule("*.experts.*", "bf16")], [], CONFIG)
    least = effective_bits(counted(GROUPS, kept), {name: decision.choice or "nvfp4" for name, decision in kept.items()})
    assert least > BITS["nvfp4"]
    with pytest.raises(UserError, match=f"the least possible here is {least:.2f}"):
        check_budget(GROUPS, kept, 4.5)
    check_budget(GROUPS, kept, least + 0.001)
    mix(GROUPS, kept, losses(), least + 0.001)
