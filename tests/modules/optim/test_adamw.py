"""AdamW equals torch's; a skipped step leaves no trace; the groups decay what should decay."""

import pytest
import torch
from torch import Tensor, nn

from modules.errors import UserError
from modules.optim.adamw import AdamW, OptimizerConfig, parameter_groups
from tests.modules.helpers import assert_close, make_network, tiny_config

SHAPES = [(7, 5), (5,), (3, 4, 2), (1,)]


def make_parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def groups(parameters: list[nn.Parameter], decay: float) -> list[dict]:
    return [{"params": parameters[::2], "weight_decay": decay}, {"params": parameters[1::2], "weight_decay": 0.0}]


@pytest.mark.parametrize(
    "changes", [{}, {"betas": (0.8, 0.99)}, {"epsilon": 1e-2}, {"weight_decay": 0.0}, {"weight_decay": 1.0}]
)
def test_equals_torch(changes: dict) -> None:
    config = OptimizerConfig(learning_rate=3e-2, **changes)
    ours, theirs = make_parameters(), make_parameters()
    optimizer = AdamW(groups(ours, config.weight_decay), config)
    reference = torch.optim.AdamW(
        groups(theirs, config.weight_decay), lr=3e-2, betas=config.betas, eps=config.epsilon, foreach=False, fused=False
    )
    for step in range(5):
        for each in (optimizer, reference):
            for group in each.param_groups:
                group["lr"] = 3e-2 / (step + 1)
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        reference.step()
    for actual, expected in zip(ours, theirs, strict=True):
        assert_close(actual, expected, 1e-6)


def snapshot(optimizer: AdamW) -> list[Tensor]:
    tensors = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    tensors += [optimizer.state[parameter][key] for parameter in tensors for key in ("exp_avg", "exp_avg_sq", "step")]
    return [tensor.detach().clone() for tensor in tensors]


def test_a_skipped_step_leaves_parameters_moments_and_step_counts() -> None:
    parameters = make_parameters()
    optimizer = AdamW(groups(parameters, 0.1), OptimizerConfig(learning_rate=1e-2))
    set_gradients(parameters, 0)
    optimizer.step()
    before = snapshot(optimizer)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    for actual, expected in zip(snapshot(optimizer), before, strict=True):
        assert torch.equal(actual, expected)

    set_gradients(parameters, 1)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    reference = make_parameters()
    plain = AdamW(groups(reference, 0.1), OptimizerConfig(learning_rate=1e-2))
    for step in (0, 1):
        set_gradients(reference, step)
        plain.step()
    for actual, expected in zip(snapshot(optimizer), snapshot(plain), strict=True):
        assert torch.equal(actual, expected)


def test_a_first_step_that_is_skipped_leaves_zero_moments() -> None:
    parameters = make_parameters()
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = AdamW(groups(parameters, 0.1), OptimizerConfig(learning_rate=1e-2))
    set_gradients(parameters, 0)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    for parameter, expected in zip(parameters, before, strict=True):
        assert torch.equal(parameter, expected)
        state = optimizer.state[parameter]
        assert not state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()
        assert state["step"].item() == 0


def test_groups_decay_matrices_only() -> None:
    network = make_network(tiny_config())
    decayed, free = parameter_groups(network, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    in_free = {names[id(parameter)] for parameter in free["params"]}
    in_decayed = {names[id(parameter)] for parameter in decayed["params"]}
    assert in_free | in_decayed == set(names.values())
    assert len(free["params"]) + len(decayed["params"]) == len(names)
    spared = ("norm.weight", "norm_f.weight", "layernorm.weight", ".bias", ".A_log", ".D", ".dt_bias")
    assert in_free == {name for name in names.values() if name.endswith(spared)}
    for kind in ("conv1d.weight", "experts.up_proj.weight", "gate.weight", "embeddings.weight", "lm_head.weight"):
        assert any(name.endswith(kind) for name in in_decayed), kind


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("betas", (0.9, 1.0)),
        ("betas", (-0.1, 0.9)),
        ("epsilon", 0.0),
        ("weight_decay", -0.1),
        ("gradient_clip_norm", 0.0),
    ],
)
def test_a_bad_setting_is_one_line_naming_its_key(key: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"^model\.optimizer\.{key}: [^\n]*$"):
        OptimizerConfig(**{"learning_rate": 1e-3, key: value})
