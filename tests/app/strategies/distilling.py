"""Two steps of distillation from a separately sharded teacher: one process of them, or one rank of two as a program."""

import json
import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from app.strategies.sharded import AXES, ShardedStrategy
from modules.backbone.model import Network
from modules.objectives.per_token import against, reverse_kl
from modules.precision.recipe import PrecisionConfig
from tests.modules.helpers import make_network, tiny_config

ROWS, LENGTH, VOCABULARY = 2, 12, 64


def make_networks(tied: bool, recipe: str) -> tuple[Network, Network]:
    """A student and a frozen teacher of another width."""
    precision = PrecisionConfig(recipe=recipe)
    student, teacher = (
        make_network(tiny_config(hybrid_override_pattern="M*", tie_word_embeddings=tied, hidden_size=size), precision)
        for size in (32, 48)
    )
    return student, teacher.requires_grad_(False).eval()


def distill(student: Network, teacher: Network, strategy: ShardedStrategy | None, rows: slice) -> dict[str, Tensor]:
    """Return the losses of two steps on some of the rows, and the whole gradients of both together.

    The first step takes hidden states that no network computed here, as from a cache; the second runs the teacher.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    cached = torch.randn(ROWS, LENGTH, 48, generator=generator)
    tokens, labels, cached = tokens[rows], labels[rows].flatten(), cached[rows]
    positions = torch.arange(0, labels.numel(), 3)
    found = {}
    for step in ("cached", "computed"):
        hidden = student(tokens).hidden.flatten(0, 1)
        with torch.no_grad():
            from_teacher = cached if step == "cached" else teacher(tokens).hidden
        inputs = {"teacher_hidden": from_teacher.flatten(0, 1), "token_weights": torch.ones(labels.numel())}
        lending = nullcontext(teacher.lm_head.logits) if strategy is None else strategy.lend(teacher.lm_head)
        with lending as teacher_head:
            loss, results = student.lm_head(hidden, against(reverse_kl, teacher_head), positions=positions, **inputs)
        if strategy is not None:
            assert isinstance(teacher.lm_head.weight, DTensor), "the teacher's head is given back"
        values = student.lm_head.token_log_probabilities(hidden, labels, positions=positions)
        ratios = (values.log_probabilities - values.log_probabilities.detach() - 0.1).exp()
        loss = loss - ratios.clamp(max=0.95).sum() - values.entropies.square().sum()
        loss.backward()
        found |= {f"{step} loss": loss.detach(), f"{step} results": results["loss"].sum()}
    for name, parameter in student.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    assert all(parameter.grad is None for parameter in teacher.parameters())
    return found


def main(rank: int, file: str) -> None:
    """Print what `distill` returns, of both ranks together, with embeddings that are not tied and that are."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    strategy = ShardedStrategy()
    strategy._device_mesh = init_device_mesh("cpu", (1, 2, 1, 1), mesh_dim_names=AXES)
    for tied in (False, True):
        student, teacher = make_networks(tied, "fp32")
        for network in (student, teacher):
            strategy.shard(network)
        found = distill(student, teacher, strategy, slice(rank, rank + 1))
        for name in found:
            if name.endswith(("loss", "results")):
                dist.all_reduce(found[name])
        if rank == 0:
            print(json.dumps({name: value.tolist() for name, value in found.items()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
