"""The strategy: summed gradients, dtypes of the units, the same training on one process and on two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from app.strategies.sharded import AXES, ShardedStrategy
from modules.backbone.model import ShardingUnit
from modules.objectives.next_token import next_token_loss
from modules.precision.recipe import FormatSchedule, PrecisionConfig, PrecisionRule
from tests.app.helpers import ROOT, load_tensors, losses
from tests.app.strategies.distilling import distill, make_networks
from tests.modules.helpers import assert_close, counts_of, document_ids, make_network, packed_batch, tiny_config

RANK_PROGRAM = """
import json, sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from app.strategies.sharded import AXES, ShardedStrategy
from tests.app.strategies.test_sharded import Small
rank, file, micro_batches = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
strategy = ShardedStrategy()
strategy._device_mesh = init_device_mesh("cpu", (1, 2, 1, 1), mesh_dim_names=AXES)
torch.manual_seed(0)
network = Small()
strategy.shard(network)
for number in range(micro_batches):
    strategy.sync_gradients(network, number == micro_batches - 1)
    network(torch.arange(8).view(1, 8) + rank + 2 * number).square().sum().backward()
    kept = [p.grad is None for p in network.parameters()]
    assert all(kept) if number < micro_batches - 1 else not any(kept), "shards get their sums at the end"
assert strategy.all_reduce(torch.tensor([rank + 1.0, rank])).tolist() == [3, 1]
assert strategy.all_reduce(torch.tensor(float(rank)), "max").item() == 1
assert strategy.all_reduce(torch.tensor(7.0), axes=("replicate", "expert", "context")).item() == 7
gradients = {name: p.grad.full_tensor().flatten().tolist() for name, p in network.named_parameters()}
if rank == 0:
    print(json.dumps([gradients, {name: list(p.to_local().shape) for name, p in network.named_parameters()}]))
dist.destroy_process_group()
"""


class Small(nn.Module):
    """Units of one and of several modules."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(16, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 16)

    def forward(self, tokens):
        hidden = self.embeddings(tokens)
        return self.head(self.norm(hidden + self.block(hidden)))

    def sharding_units(self):
        modules = ([self.block], [self.embeddings, self.head], [self])
        return [ShardingUnit(parts, torch.float32) for parts in modules]


@pytest.fixture
def strategy():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    made = ShardedStrategy()
    made._device_mesh = init_device_mesh("cpu", (1, 1, 1, 1), mesh_dim_names=AXES)
    yield made
    dist.destroy_process_group()


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_gradients_are_summed_over_ranks(tmp_path, micro_batches):
    """Two ranks with other rows each give the gradient of all rows on one plain module."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_PROGRAM, str(rank), str(tmp_path / "store"), str(micro_batches)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    gradients, shapes = json.loads(outputs[0].splitlines()[-1])
    torch.manual_seed(0)
    network = Small()
    tokens = torch.stack([torch.arange(8) + row for row in range(2 * micro_batches)])
    network(tokens).square().sum().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(torch.tensor(gradients[name]), parameter.grad.flatten(), msg=name)
    assert shapes["embeddings.weight"] == [8, 4], "each of two ranks holds half the rows"


def test_units_are_gathered_in_their_type_and_stored_in_fp32(strategy):
    seen = {}

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.low, self.full = nn.Linear(4, 4), nn.Linear(4, 4)
            for name in ("low", "full"):
                layer = getattr(self, name)
                layer.register_forward_pre_hook(
                    lambda layer, inputs, name=name: seen.update({name: (layer.weight.dtype, inputs[0].dtype)})
                )

        def forward(self, x):
            return self.full(self.low(x.bfloat16()).float())

        def sharding_units(self):
            return [
                ShardingUnit(*unit)
                for unit in (([self.low], torch.bfloat16), ([self.full], torch.float32), ([self], torch.float32))
            ]

    network = Probe()
    strategy.shard(network)
    network(torch.ones(2, 4)).sum().backward()
    assert seen["low"][0] == torch.bfloat16
    assert seen["full"] == (torch.float32, torch.float32), "inputs are not cast"
    for parameter in network.parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.dtype == parameter.grad.dtype == torch.float32
    assert all(isinstance(module, FSDPModule) for module in (network, network.low, network.full))


def test_the_network_must_be_its_last_unit(strategy):
    class Wrong(nn.Linear):
        def sharding_units(self):
            return [ShardingUnit([self, self], torch.float32)]

    with pytest.raises(AssertionError, match="last sharding unit"):
        strategy.shard(Wrong(2, 2))


def arguments(folder: Path, run_file: Path, *options: str) -> list[str]:
    return [
        *("fit", f"--config={run_file}", f"--trainer.default_root_dir={folder}", "--model.init_args.dropout=0"),
        *(f"--model.init_args.loss_file={folder / 'losses.txt'}", *options),
    ]


def losses_of(folder: Path) -> dict[int, float]:
    return {step: float.fromhex(value) for step, values in losses(folder / "losses.txt").items() for value in values}


def test_two_processes_train_like_one_and_continue_each_others_checkpoints(program, tmp_path, run_file):
    """The runs of two processes start at the same moment, so that their ports would collide if they could."""
    one, two, mixed = (tmp_path / name for name in ("one", "two", "mixed"))
    for folder in (one, two, mixed):
        folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "app", *arguments(folder, run_file, "--trainer.devices=2", *options)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for folder, options in ((two, []), (mixed, ["--trainer.max_steps=6"]))
    ]
    assert program.run(*arguments(one, run_file)).code == 0
    for process in running:
        output = process.communicate(timeout=240)[0]
        assert process.returncode == 0, output
    result = program.run(*arguments(mixed, run_file))
    assert result.code == 0, result.output
    assert "trainer.devices: 2 -> 1" in result.output
    alone = losses_of(one)
    assert alone.keys() == set(range(1, 13))
    for folder in (two, mixed):
        assert losses_of(folder) == pytest.approx(alone, rel=1e-5)
    last = "run/checkpoints/step=00000012"
    first, second = load_tensors(one / last), load_tensors(two / last)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-4, atol=1e-5, msg=name)


def test_quantised_products_are_the_same_sharded_and_not(strategy):
    """Gathered weights are quantised to the same numbers, and the same random numbers round the gradients."""
    # The gradient of the embedding is summed in the dtype that it is gathered in, as those of several MTP depths are.
    recipe = PrecisionConfig(bf16_tail=0, rules=[PrecisionRule(pattern="*embeddings", format="fp32")])
    batch = packed_batch(document_ids([5, 27], [32]), 64)
    found = []
    for shard in (False, True):
        network = make_network(tiny_config(), recipe)
        if shard:
            strategy.shard(network)
        FormatSchedule(recipe, network).reseed(0, 0, 0)
        loss = next_token_loss(network, batch, counts_of(batch, 0), 0, 0.0).loss
        loss.backward()
        whole = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
        found.append((loss, {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in whole.items()}))
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        assert gradient.dtype == found[1][1][name].dtype == torch.float32
        assert torch.equal(gradient, found[1][1][name]), name


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_distillation_is_the_same_sharded_and_not(strategy, tied, recipe):
    """A teacher's head is lent before its network has run and after; entries of the head other than forward gather."""
    plain = distill(*make_networks(tied, recipe), None, slice(0, 2))
    networks = make_networks(tied, recipe)
    for network in networks:
        strategy.shard(network)
    with pytest.raises(RuntimeError, match="DTensor"):
        networks[1].lm_head.logits(torch.ones(1, 48))
    sharded = distill(*networks, strategy, slice(0, 2))
    assert plain.keys() == sharded.keys()
    for name, value in plain.items():
        assert_close(sharded[name], value, 1e-5 if recipe == "fp32" else 1e-2, name)


def test_two_ranks_distil_like_one_process(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.app.strategies.distilling"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    for tied, line in zip((False, True), outputs[0].splitlines()[-2:], strict=True):
        two, one = json.loads(line), distill(*make_networks(tied, "fp32"), None, slice(0, 2))
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert_close(torch.tensor(two[name]), value, 1e-5, name)
