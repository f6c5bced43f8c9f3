"""Whether torch.compile pays on this CPU: seconds to start, seconds a step, and the steps after which it has paid.

    python -m benchmarks.compile_layers [--models tiny hybrid] [--formats fp32 bf16] [--kinds M*- ME*-] [--rounds 7]

Layers of the given kinds are compiled and then sharded, as `model.compile_layers` does on CUDA. Compiled steps
alternate with eager ones in the same process; every row of the table is a process of its own with an empty compile
cache, and its start once more with the filled one. Documents differ in every batch, as in training. "Pays after" counts
CPU seconds from a cold start.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from types import SimpleNamespace
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from app.strategies.sharded import ShardedStrategy
from benchmarks.training_step import MTP_LOSS_FACTOR, OPTIMIZER, models
from modules.backbone.config import BackboneConfig
from modules.backbone.initialization import initialize
from modules.backbone.layer import Layer
from modules.backbone.model import Network
from modules.batch import PackedBatch, count_targets, next_token_labels
from modules.objectives.next_token import next_token_loss
from modules.optim.adamw import AdamW, parameter_groups
from modules.optim.clipping import clip_gradients
from modules.precision.recipe import PrecisionConfig, assign_formats

ROWS, LENGTH = 4, 512
COLUMNS = (
    "model",
    "format",
    "compiled",
    "start CPU (wall)",
    "from cache",
    "eager step CPU (wall)",
    "compiled",
    "ratio",
)
WIDTHS = (7, 7, 9, 17, 15, 22, 15, 7)


class Seconds(NamedTuple):
    """A duration."""

    cpu: float
    """Of this process and its finished children, all threads."""
    wall: float
    """By the clock."""


class Result(NamedTuple):
    """What one process measured."""

    start: Seconds
    """The first two steps (the second meets other document lengths), less what two later steps take."""
    eager: Seconds
    """Median eager step."""
    compiled: Seconds
    """Median compiled step."""


def build(config: BackboneConfig, number_format: str, kinds: str) -> Network:
    """Return a network compiled and laid out as `StageModule.configure_model` does."""
    with torch.device("meta"):
        network = Network(config)
    assign_formats(PrecisionConfig(recipe=number_format), network)  # type: ignore[arg-type]
    for layer in network.modules():
        if isinstance(layer, Layer) and layer.letter in kinds:
            layer.compile()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))
    ShardedStrategy.shard(cast(ShardedStrategy, SimpleNamespace(device_mesh=mesh)), network)
    network.to_empty(device="cpu")
    initialize(network, seed=0)
    return network


def batch(config: BackboneConfig, depths: int, seed: int) -> PackedBatch:
    """Return rows of random tokens in documents of 64 tokens on average."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, config.vocab_size, (ROWS, LENGTH), generator=generator)
    ids = (torch.rand(ROWS, LENGTH, generator=generator) < 1 / 64).cumsum(1).int()
    labels = next_token_labels(tokens, ids)
    return PackedBatch(tokens=tokens, labels=labels, document_ids=ids)


def measure(model: str, number_format: str, kinds: str, rounds: int, threads: int, cache: str) -> Result:
    """Run in a process of its own: start, then time eager and compiled steps in turn."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # in this process, so that its CPU seconds are counted
    torch.set_num_threads(threads)
    config, depths = models()[model]
    network = build(config, number_format, kinds)
    optimizer = AdamW(parameter_groups(network, OPTIMIZER.weight_decay), OPTIMIZER)

    def step(seed: int, stance: str) -> Seconds:
        torch.compiler.set_stance(stance)
        data = batch(config, depths, seed)
        cpu, wall = cpu_seconds(), time.perf_counter()
        counts = count_targets(data.labels, data.document_ids, depths)
        next_token_loss(network, data, counts, depths, MTP_LOSS_FACTOR).loss.backward()
        clip_gradients(network.parameters(), OPTIMIZER.gradient_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return Seconds(cpu_seconds() - cpu, time.perf_counter() - wall)

    step(0, "force_eager")
    first = [step(seed, "default") for seed in (1, 2)]
    step(3, "default")
    pairs = [(step(seed, "force_eager"), step(seed, "default")) for seed in range(4, 4 + rounds)]
    eager, compiled = (median(list(steps)) for steps in zip(*pairs, strict=True))
    start = Seconds(
        *(max(0.0, sum(axis) - 2 * usual) for axis, usual in zip(zip(*first, strict=True), compiled, strict=True))
    )
    return Result(start, eager, compiled)


def cpu_seconds() -> float:
    """Return user and system seconds of this process and its finished children (compilers)."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def median(steps: list[Seconds]) -> Seconds:
    """Return the median of each axis."""
    return Seconds(*(statistics.median(axis) for axis in zip(*steps, strict=True)))


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "hybrid"], choices=["tiny", "hybrid"])
    parser.add_argument("--formats", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--kinds", nargs="+", default=["M*-"], help="layers to compile, a row each")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of steps; the median counts (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {args.threads} thread(s), {ROWS} rows of {LENGTH} tokens; s = seconds")
    print(line(*COLUMNS, "pays after"))
    processes = multiprocessing.get_context("spawn")
    for model in args.models:
        for number_format in args.formats:
            for kinds in args.kinds:
                with tempfile.TemporaryDirectory() as cache, processes.Pool(1, maxtasksperchild=1) as pool:
                    case = (model, number_format, kinds, args.rounds, args.threads, cache)
                    cold, warm = (pool.apply(measure, case) for _ in range(2))
                print(row(model, number_format, kinds, cold, warm), flush=True)


def row(model: str, number_format: str, kinds: str, cold: Result, warm: Result) -> str:
    """Return a line of the table."""
    gain = cold.eager.cpu - cold.compiled.cpu
    pays = f"{cold.start.cpu / gain:,.0f} steps" if gain > 0 else "never"
    starts = [f"{start.cpu:.1f} ({start.wall:.1f})" for start in (cold.start, warm.start)]
    steps = [f"{step.cpu:.3f} ({step.wall:.3f})" for step in (cold.eager, cold.compiled)]
    return line(model, number_format, kinds, *starts, *steps, f"{cold.eager.cpu / cold.compiled.cpu:.2f}x", pays)


def line(*cells: str) -> str:
    """Return cells in columns, the first three to the left."""
    aligned = [
        f"{cell:{'<' if n < 3 else '>'}{width}}" for n, (cell, width) in enumerate(zip(cells, WIDTHS, strict=False))
    ]
    return "  ".join([*aligned, cells[-1]])


if __name__ == "__main__":
    main()
