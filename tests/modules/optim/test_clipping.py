"""Clipping equals torch's, over plain tensors and DTensors alike."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from modules.optim.clipping import clip_gradients
from tests.modules.helpers import assert_close


def make_parameters(scale: float = 1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in [(7, 5), (5,), (3, 4, 2), (2,)]]
    for parameter in parameters[:3]:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return parameters  # the last has no gradient


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("max_norm", [0.5, 1.0, 100.0])
def test_equals_torch(max_norm: float, scale: float) -> None:
    ours, theirs = make_parameters(scale), make_parameters(scale)
    norm = clip_gradients(ours, max_norm)
    assert_close(norm, nn.utils.clip_grad_norm_(theirs, max_norm), 1e-6)
    assert norm.dtype == torch.float32
    for actual, expected in zip(ours[:3], theirs[:3], strict=True):
        assert_close(actual.grad, expected.grad, 1e-6)
    assert ours[3].grad is None


def test_none_only_measures() -> None:
    parameters = make_parameters(100.0)
    before = [parameter.grad.clone() for parameter in parameters[:3]]
    norm = clip_gradients(parameters, None)
    assert norm.item() == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in before)), rel=1e-6)
    for parameter, gradient in zip(parameters, before, strict=False):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(bad: float) -> None:
    parameters = make_parameters()
    parameters[1].grad[2] = bad
    assert not clip_gradients(parameters, 1.0).isfinite()


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensors_of_several_layouts_and_plain_tensors_together(mesh) -> None:
    ours, theirs = make_parameters(), make_parameters()
    for index, placement in ((0, Shard(0)), (2, Replicate())):
        sharded = nn.Parameter(DTensor.from_local(ours[index].detach(), mesh, [placement]))
        sharded.grad = DTensor.from_local(ours[index].grad, mesh, [placement])
        ours[index] = sharded
    assert_close(clip_gradients(ours, 0.5), nn.utils.clip_grad_norm_(theirs, 0.5), 1e-6)
    for actual, expected in zip(ours[:3], theirs[:3], strict=True):
        gradient = actual.grad.to_local() if isinstance(actual.grad, DTensor) else actual.grad
        assert_close(gradient, expected.grad, 1e-6)
