"""Initial weights depend on seed and name only, follow the published distributions, and leave nothing unset."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from modules.backbone.config import BackboneConfig
from modules.backbone.initialization import initialize
from modules.backbone.model import Network
from tests.modules.helpers import tiny_config

LARGE = {
    "vocab_size": 500,
    "hidden_size": 96,
    "initializer_range": 0.02,
    "mamba_num_heads": 256,
    "mamba_head_dim": 2,
    "moe_intermediate_size": 64,
    "moe_latent_size": 48,
    "conv_kernel": 4,
}


def initialized(config: BackboneConfig, seed: int = 0) -> Network:
    """A network whose every element was NaN before."""
    network = Network(config)
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            tensor.fill_(math.nan)
    initialize(network, seed)
    return network


def tensors(network: Network) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"moe_latent_size": None}])
def test_nothing_is_left_unset(changes: dict) -> None:
    for name, tensor in tensors(initialized(tiny_config(**changes))).items():
        assert tensor.isfinite().all(), name


def test_the_same_seed_gives_the_same_and_another_seed_other_weights() -> None:
    first, again, other = (tensors(initialized(tiny_config(), seed)) for seed in (1, 1, 2))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        constant = name.endswith(("norm.weight", "norm_f.weight", "layernorm.weight", ".D", "bias")) and (
            "dt_bias" not in name and "conv1d" not in name
        )
        assert torch.equal(tensor, other[name]) == constant, name


def test_independent_of_construction_and_of_the_global_generator() -> None:
    """Layers added behind, parameters walked in another order, another global seed: the same weights."""
    reference = tensors(initialized(tiny_config(rescale_prenorm_residual=False)))
    torch.manual_seed(12345)
    longer = initialized(tiny_config(rescale_prenorm_residual=False, hybrid_override_pattern="ME*-MEMM*E"))
    for name, tensor in tensors(longer).items():
        if name in reference:
            assert torch.equal(tensor, reference[name]), name
    network = Network(tiny_config(rescale_prenorm_residual=False))
    for module in network.modules():
        module._parameters = dict(reversed(module._parameters.items()))
        module._modules = dict(reversed(module._modules.items()))
    initialize(network, 0)
    for name, tensor in tensors(network).items():
        assert torch.equal(tensor, reference[name]), name


def test_no_two_tensors_and_no_two_experts_share_their_numbers() -> None:
    rows = [
        row
        for name, parameter in initialized(tiny_config()).named_parameters()
        if parameter.ndim >= 2
        for row in parameter.detach().flatten(0, -2)[:, :3].tolist()
    ]
    assert len({tuple(row) for row in rows}) == len(rows)


def test_experts_do_not_depend_on_their_number() -> None:
    few, many = (tensors(initialized(tiny_config(n_routed_experts=count))) for count in (4, 8))
    name = "backbone.layers.1.mixer.experts.up_proj.weight"
    assert torch.equal(few[name], many[name][:4])


def check_normal(tensor: Tensor, deviation: float, name: str) -> None:
    count = tensor.numel()
    assert abs(tensor.mean().item()) < 5 * deviation / math.sqrt(count), name
    assert tensor.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * count)), name
    within = ((tensor.abs() < deviation).float().mean() - math.erf(1 / math.sqrt(2))).abs().item()
    assert within < 5 * 0.47 / math.sqrt(count), f"{name} is not normal"


@pytest.mark.parametrize("latent", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_matrices_are_normal_and_residual_outputs_smaller(rescale: bool, latent: bool) -> None:
    changes = {} if latent else {"moe_latent_size": None}
    config = tiny_config(**{**LARGE, **changes}, rescale_prenorm_residual=rescale)
    outputs = ["out_proj.weight", "o_proj.weight", "mixer.down_proj.weight", "shared_experts.down_proj.weight"]
    outputs += ["fc2_latent_proj.weight"] if latent else ["mixer.experts.down_proj.weight"]
    seen = set()
    for name, tensor in tensors(initialized(config)).items():
        if tensor.ndim < 2 or "conv1d" in name:
            continue
        written = [output for output in outputs if name.endswith(output)]
        seen.update(written)
        check_normal(tensor, 0.02 / math.sqrt(6) if written and rescale else 0.02, name)
    assert seen == set(outputs)


def test_vectors_have_their_published_ranges() -> None:
    config = tiny_config(**LARGE, time_step_min=0.001, time_step_max=0.1)
    state = tensors(initialized(config))
    for name, tensor in state.items():
        if name.endswith("A_log"):
            decay = tensor.exp()
            assert decay.min() >= 1
            assert decay.max() <= 16.001
            assert decay.mean().item() == pytest.approx(8.5, rel=0.1), "uniform in A, not in log A"
        elif name.endswith("dt_bias"):
            step = nn.functional.softplus(tensor)
            assert step.min() >= 0.000999
            assert step.max() <= 0.1001
            assert step.log().mean().item() == pytest.approx(math.log(0.01), rel=0.07), "uniform in log dt"
        elif "conv1d" in name:
            assert 0.45 < tensor.abs().max() <= 0.5
            assert abs(tensor.mean()) < 0.05
        elif name.endswith("e_score_correction_bias"):
            assert not tensor.any()
        elif tensor.ndim == 1:
            assert (tensor == 1).all(), name


def test_the_step_floor_holds() -> None:
    config = tiny_config(**LARGE, time_step_min=0.001, time_step_max=0.1, time_step_floor=0.05)
    steps = nn.functional.softplus(tensors(initialized(config))["backbone.layers.0.mixer.dt_bias"])
    assert steps.min().item() == pytest.approx(0.05, rel=1e-4)
    assert (steps > 0.06).any()


@pytest.fixture
def process_group():
    """Join a pretended group of many ranks, one rank at a time."""

    def join(rank: int, world_size: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)

    yield join
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(module: nn.Module, mesh, placements) -> None:
    """Give this rank its slice of every parameter, filled with NaN, as FSDP2 lays tensors out."""
    for child in module.modules():
        for name, parameter in list(child._parameters.items()):
            if parameter is not None:
                rows = torch.arange(parameter.shape[0])
                for axis, placement in enumerate(placements):
                    if isinstance(placement, Shard):
                        parts = rows.chunk(mesh.size(axis))
                        rank = mesh.get_local_rank(axis)
                        rows = parts[rank] if rank < len(parts) else rows[:0]
                local = torch.full((len(rows), *parameter.shape[1:]), math.nan)
                # Not wrapped as nn.Parameter: that would bring in DTensor's cache, which mixes up meshes of two groups.
                child._parameters[name] = DTensor.from_local(
                    local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
                )


@pytest.mark.parametrize(
    ("shape", "placements"),
    [((2,), [Shard(0)]), ((3,), [Shard(0)]), ((16,), [Shard(0)]), ((2, 2), [Replicate(), Shard(0)])],
)
def test_every_rank_draws_its_part_of_the_same_weights(process_group, shape: tuple[int, ...], placements) -> None:
    config = tiny_config(tie_word_embeddings=False)
    whole = {name: parameter.detach() for name, parameter in initialized(config).named_parameters()}
    world_size = math.prod(shape)
    shards: dict[str, list[Tensor]] = {name: [] for name in whole}
    for rank in range(world_size):
        process_group(rank, world_size)
        network = Network(config)
        shard(network, init_device_mesh("cpu", shape), placements)
        initialize(network, 0)
        for name, parameter in network.named_parameters():
            shards[name].append(parameter.to_local().detach().clone())
    copies = world_size // shape[-1]
    for name, tensor in whole.items():
        for copy in range(copies):
            parts = shards[name][copy * shape[-1] : (copy + 1) * shape[-1]]
            assert torch.equal(torch.cat(parts), tensor), name
