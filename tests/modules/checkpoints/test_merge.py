"""Averages of models, and weights that stand for a decay of the learning rate."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from modules.checkpoints.export import export
from modules.checkpoints.merge import MergedSource, decay_weights, normalize
from modules.checkpoints.source import open_model
from modules.errors import UserError
from modules.optim.schedule import ScheduleConfig
from tests.modules.checkpoints.folders import public_tensors, stored_tensors, write_fit_folder, write_hf_folder
from tests.modules.helpers import make_network, tiny_config

BIAS = "e_score_correction_bias"


def descend(start: torch.Tensor, rates: list[float], gradient) -> list[torch.Tensor]:
    """The iterates of SGD, the start among them."""
    iterates = [start]
    for step, rate in enumerate(rates):
        iterates.append(iterates[-1] - rate * gradient(iterates[-1], step))
    return iterates


def average(weights: list[float], checkpoints: list[torch.Tensor]) -> torch.Tensor:
    return sum(weight * checkpoint for weight, checkpoint in zip(weights, checkpoints, strict=True))


@pytest.mark.parametrize("minimum", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("warmup", [0, 5])
def test_the_average_of_every_iterate_is_the_decayed_run(minimum: float, warmup: int):
    """The gradients do not depend on the iterate here, so both are equal."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    schedule = ScheduleConfig(warmup_tokens=warmup, decay_tokens=40, minimum_ratio=minimum)
    start = torch.randn(8, generator=generator, dtype=torch.float64)
    decayed = descend(start, [0.1 * schedule.factor(step + 1, 60) for step in range(60)], lambda x, t: gradients[t])
    constant = [0.1 * min(1.0, (step + 1) / (warmup or 1)) for step in range(60)]
    iterates = descend(start, constant, lambda x, t: gradients[t])
    weights = decay_weights(range(20, 61), ScheduleConfig(decay_tokens=40, minimum_ratio=minimum).factor)
    torch.testing.assert_close(average(weights, iterates[20:]), decayed[-1], rtol=0, atol=1e-12)
    assert sum(weights) == pytest.approx(1)
    assert min(weights) >= 0


def test_checkpoints_far_apart_move_as_far_as_the_decay():
    """Equal where the gradient is constant between checkpoints, however unequal their distances are."""
    steps = [100, 110, 140, 145, 200]
    generator = torch.Generator().manual_seed(0)
    between = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    gradients = torch.cat([between[n].expand(b - a, 8) for n, (a, b) in enumerate(pairwise(steps))])
    start = torch.zeros(8, dtype=torch.float64)
    schedule = ScheduleConfig(decay_tokens=100, minimum_ratio=0.01)
    decayed = descend(start, [schedule.factor(step + 1, 100) for step in range(100)], lambda x, t: gradients[t])
    iterates = descend(start, [1.0] * 100, lambda x, t: gradients[t])
    weights = decay_weights(steps, schedule.factor)
    merged = average(weights, [iterates[step - 100] for step in steps])
    torch.testing.assert_close(merged, decayed[-1], rtol=0, atol=1e-12)


def test_on_a_noisy_quadratic_the_average_is_where_the_decayed_run_ends():
    """Here the gradients do depend on the iterate: near, and much nearer than the last iterate."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 16, generator=generator, dtype=torch.float64)
    curvature = torch.linspace(0.001, 0.02, 16, dtype=torch.float64)

    def gradient(x: torch.Tensor, step: int) -> torch.Tensor:
        return curvature * x + noise[step]

    schedule = ScheduleConfig(decay_tokens=400, minimum_ratio=0.01)
    start = torch.zeros(16, dtype=torch.float64)
    decayed = descend(start, [0.1 * schedule.factor(step + 1, 2000) for step in range(2000)], gradient)[-1]
    iterates = descend(start, [0.1] * 2000, gradient)
    steps = list(range(1600, 2001, 20))
    merged = average(decay_weights(steps, schedule.factor), [iterates[step] for step in steps])
    assert (merged - decayed).norm() < 0.2 * (iterates[-1] - decayed).norm()


def test_weights_are_an_average():
    assert normalize([3, 1], 2) == [0.75, 0.25]
    for weights, message in (
        ([1.0], "1 given for 2 MODELs"),
        ([1.0, -0.5], "-0.5 must be finite and not negative"),
        ([1.0, float("nan")], "nan must be finite"),
        ([0.0, 0.0], "all are 0"),
    ):
        with pytest.raises(UserError, match=f"--weights: .*{message}"):
            normalize(weights, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_the_average_in_the_dtype_of_the_first(tmp_path: Path, dtype: torch.dtype):
    config = tiny_config()
    networks = [make_network(config, seed=seed) for seed in range(3)]
    write_hf_folder(tmp_path / "a", networks[0], dtype)
    write_fit_folder(tmp_path / "b", networks[1])
    write_hf_folder(tmp_path / "c", networks[2], torch.bfloat16)
    sources = [open_model(tmp_path / name) for name in "abc"]
    merged = MergedSource(sources, [2, 1, 1], "By hand.")
    export(merged, tmp_path / "out", max_shard_bytes=20_000, report=lambda line: None)
    found = stored_tensors(tmp_path / "out")
    tensors = [public_tensors(network) for network in networks]
    assert found.keys() == tensors[0].keys()
    for name, tensor in found.items():
        island = name.endswith(BIAS)
        assert tensor.dtype == (torch.float32 if island else dtype), name
        first = tensors[0][name] if island else tensors[0][name].to(dtype).float()
        third = tensors[2][name] if island else tensors[2][name].bfloat16().float()
        expected = first.double() / 2 + tensors[1][name].double() / 4 + third.double() / 4
        torch.testing.assert_close(
            tensor.double(), expected, rtol=2**-8 if tensor.dtype != torch.float32 else 1e-6, atol=1e-7
        )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| a | 0.500000 |\n| small, step 20 | 0.250000 |\n| c | 0.250000 |" in card
    assert "By hand. All tensors are averaged in fp32" in card
    assert "- merge\n" in card
    assert "4.2500" not in card, "the validation of one of them is not that of the average"


def test_one_model_stays_as_it_is(tmp_path: Path):
    network = make_network(tiny_config())
    source = open_model(write_hf_folder(tmp_path / "a", network, torch.bfloat16))
    merged = MergedSource([source, source], [1, 0], "")
    for name in source.tensors:
        assert torch.equal(merged.read(name), source.read(name)), name


def test_models_of_another_architecture_are_refused(tmp_path: Path):
    first = open_model(write_fit_folder(tmp_path / "a", make_network(tiny_config())))
    other = open_model(write_fit_folder(tmp_path / "b", make_network(tiny_config(n_groups=4, moe_latent_size=None))))
    with pytest.raises(UserError, match=r"different architectures: n_groups 2 and 4, moe_latent_size 16 and None"):
        MergedSource([first, other], [1, 1], "")
    speed = open_model(write_fit_folder(tmp_path / "c", make_network(tiny_config(chunk_size=4, time_step_min=0.01))))
    MergedSource([first, speed], [1, 1], "")


def test_fields_that_no_layer_uses_may_differ(tmp_path: Path):
    """config.json has transformers' defaults for them."""
    network = make_network(tiny_config(hybrid_override_pattern="ME*", intermediate_size=0))
    first = open_model(write_fit_folder(tmp_path / "a", network))
    export(first, tmp_path / "b", max_shard_bytes=10**9, report=lambda line: None)
    other = open_model(tmp_path / "b")
    assert other.config.intermediate_size != 0
    MergedSource([first, other], [1, 1], "")
