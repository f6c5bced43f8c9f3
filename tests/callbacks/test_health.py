"""Health of experts and residual stream, against the same numbers worked out the plain way."""

import math

import pytest
import torch
from torch import Tensor

from callbacks.health import Health, Observation, expert_metrics, layer_names, layers
from modules.backbone.layer import Layer
from modules.backbone.router import Routing
from modules.batch import PackedBatch
from modules.errors import UserError
from modules.pretraining import Pretraining
from tests.callbacks.helpers import run
from tests.modules.helpers import (
    BF16,
    ListData,
    build,
    document_ids,
    make_module,
    make_network,
    packed_batch,
    perturb,
    row_batches,
    tiny_config,
)

NAMES = [f"layer_{index:02d}" for index in range(6)] + ["mtp_0", "mtp_1"]
MIXTURES = ["layer_01", "layer_05", "mtp_1"]


def by_hooks(module: Pretraining, batches: list[PackedBatch]) -> dict[str, list[list[tuple[Tensor, Tensor, Tensor]]]]:
    """Return (residual stream, probabilities, counts) of every call of each layer, in the order of the layers."""
    seen = {name: [] for name in NAMES}
    found = [layer for layer in module.built_network.modules() if isinstance(layer, Layer)]
    for name, layer in zip(NAMES, found, strict=True):
        layer.register_forward_hook(lambda _, args, out, name=name: seen[name].append(out))
    with torch.no_grad():
        for batch in batches:
            module.built_network(batch.tokens, batch.document_ids, module.mtp_depths)
    return seen


def expected(module: Pretraining, batches: list[PackedBatch]) -> dict[str, float]:
    """Work out the metrics of one step, token by token where that is what they are about."""
    values = {}
    routers = module.built_network.routers()
    for name, calls in by_hooks(module, batches).items():
        stream = torch.cat([x.double().flatten() for x, _ in calls])
        values[f"residual/rms/{name}"] = math.sqrt((stream**2).mean())
        if name in MIXTURES:
            entropies = []
            for _, routing in calls:
                for p in routing.probabilities.double().flatten(0, 1).tolist():
                    entropies.append(-sum(q * math.log(q) for q in p) / math.log(len(p)))
            load = sum(routing.counts.sum(0) for _, routing in calls).tolist()
            mean = sum(load) / len(load)
            bias = routers[MIXTURES.index(name)].e_score_correction_bias.tolist()
            values[f"experts/router_entropy/{name}"] = sum(entropies) / len(entropies)
            values[f"experts/load_max_over_mean/{name}"] = max(load) / mean
            values[f"experts/load_variation/{name}"] = math.sqrt(sum((n - mean) ** 2 for n in load) / len(load)) / mean
            values[f"experts/dead_fraction/{name}"] = load.count(0) / len(load)
            values[f"experts/bias_spread/{name}"] = max(bias) - min(bias)
    for value, pick in {
        "router_entropy": min,
        "load_max_over_mean": max,
        "load_variation": max,
        "dead_fraction": max,
        "bias_spread": max,
    }.items():
        values[f"experts/{value}/worst"] = pick(values[f"experts/{value}/{name}"] for name in MIXTURES)
    return values


def perturbed(**changes) -> Pretraining:
    """A module whose routers are uneven; nothing moves (learning rate next to 0), so that every step is the same."""
    module = make_module(expert_bias_rate=0.0, **changes)
    build(module)
    perturb(module.built_network)
    return module


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_first_step_has_the_values_of_a_plain_computation(window: int, checkpointing: bool):
    batches = row_batches(2)
    module = perturbed(activation_checkpointing=checkpointing)
    wanted = expected(module, batches[:window])
    logged = run(perturbed(activation_checkpointing=checkpointing), ListData(batches, window), Health(1))[1]
    found = {name: value for name, value in logged.items() if name.startswith(("experts/", "residual/"))}
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-7)


def test_points_are_those_of_the_interval_the_first_and_the_last_step():
    points = run(make_module(), ListData(row_batches(7)), Health(3))
    assert [step for step, values in points.items() if "experts/dead_fraction/worst" in values] == [1, 3, 6, 7]


def test_looking_changes_nothing_and_ends_with_the_step():
    plain, watched = make_module(precision=BF16), make_module(precision=BF16)
    data = row_batches(4)
    without, with_health = run(plain, ListData(data, 2)), run(watched, ListData(data, 2), Health(1))
    for step, values in without.items():
        assert {name: with_health[step][name] for name in values} == values
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, watched.state_dict()[name]), name
    assert watched.built_network.observer is None
    assert watched.built_network.mtp.observer is None


def test_a_network_without_experts_has_a_residual_stream_only():
    config = tiny_config(hybrid_override_pattern="M*-", num_nextn_predict_layers=0)
    points = run(make_module(config, mtp_depths=0), ListData([packed_batch(document_ids([16]), 64)]), Health(1))
    found = {name for name in points[1] if name.startswith(("experts/", "residual/"))}
    assert found == {"residual/rms/layer_00", "residual/rms/layer_01", "residual/rms/layer_02"}


def test_experts_by_hand():
    counts = torch.tensor([[8, 0, 0, 0], [2, 2, 2, 2]])
    bias = torch.tensor([[0.5, -1.0, 0.0, 0.25], [64.0, 64.0, 64.0, 64.0]])
    values = {name: value.tolist() for name, value in expert_metrics(counts, bias).items()}
    assert values["load_max_over_mean"] == [4.0, 1.0]
    assert values["load_variation"] == pytest.approx([math.sqrt(3), 0.0])
    assert values["dead_fraction"] == [0.75, 0.0]
    assert values["bias_spread"] == [1.5, 0.0]


def test_layers_are_named_as_in_checkpoints():
    network = make_network(tiny_config())
    assert layer_names(network) == NAMES
    assert [layer.letter for layer in layers(network)] == [*"ME*-ME", *"*E"]


def test_intervals_below_one_are_refused():
    with pytest.raises(UserError, match=r"health\.every_n_steps is 0"):
        Health(every_n_steps=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_looking_does_not_wait_for_the_device():
    network = make_network(tiny_config()).cuda()
    observation = Observation(network)
    x, probabilities = torch.randn(2, 16, 32, device="cuda"), torch.rand(2, 16, 8, device="cuda").softmax(-1)
    routing = Routing(probabilities, torch.zeros(2, 8, dtype=torch.int64, device="cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for layer in layers(network):
            observation.add(layer, x, routing if layer.letter == "E" else None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
