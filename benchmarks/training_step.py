"""One training step of ours against transformers' `NemotronHForCausalLM`: the same weights, rows and precision.

    python -m benchmarks.training_step [--rows 4] [--length 512] [--formats fp32 bf16] [--threads 1 2] [--rounds 7]

A step is forward, loss, backward, clipping and fused AdamW, with fp32 master weights on both sides: "bf16" is our bf16
recipe against transformers under autocast, and against transformers with weights and optimiser in bf16 (which trains
worse and saves the casts). Ours takes packed rows, as in training; theirs knows none. Each side lives in a process of
its own and takes steps in turn, so that a busy machine slows all alike; a ratio is the median of the ratios of
neighbouring steps. `fit` keeps freed memory (`app.__main__.settle_process`), which a user of transformers does not by
default: one more row shows transformers with the same setting.
Beside it: the step's matrix products over what large products reach here, the most expensive operations, peak memory.
"""

import argparse
import dataclasses
import os
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from app.__main__ import settle_process
from benchmarks.side import Side, timed
from modules.backbone.config import BackboneConfig
from modules.backbone.flops import training_flops_per_token
from modules.backbone.initialization import initialize
from modules.backbone.model import Network
from modules.batch import PackedBatch, count_targets, next_token_labels
from modules.objectives.next_token import next_token_loss
from modules.optim.adamw import AdamW, OptimizerConfig, parameter_groups
from modules.optim.clipping import clip_gradients
from modules.precision.recipe import PrecisionConfig, assign_formats

CONFIG = BackboneConfig(
    vocab_size=8192,
    hidden_size=256,
    hybrid_override_pattern="MEMEM*EME",
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    mamba_num_heads=8,
    mamba_head_dim=64,
    ssm_state_size=128,
    n_groups=1,
    chunk_size=64,
    n_routed_experts=32,
    num_experts_per_tok=6,
    moe_intermediate_size=192,
    moe_latent_size=128,
    moe_shared_expert_intermediate_size=384,
    routed_scaling_factor=2.5,
)
"""A hybrid of 14 million parameters; Mamba-2 heads, state and heads a group are those of Nemotron 3 Nano."""
OPTIMIZER = OptimizerConfig(learning_rate=1e-4)
MTP_LOSS_FACTOR = 0.3
OURS, THEIRS, SETTLED, PURE = "ours", "transformers", "transformers, memory kept", "transformers, bf16 weights"
SIDES = [OURS, THEIRS, SETTLED, PURE]
PEAK_SIZE = 2048
"""Rows and columns of the product that measures the machine's peak."""
Step = Callable[[], Tensor]


def models() -> dict[str, tuple[BackboneConfig, int]]:
    """Return (configuration, MTP depths) by name: the model of configs/pretrain.yaml, and the larger one above."""
    run = yaml.safe_load(Path("configs/pretrain.yaml").read_text(encoding="utf-8"))["model"]["init_args"]
    return {"tiny": (BackboneConfig(**run["backbone"]), run["mtp_depths"]), "hybrid": (CONFIG, 0)}


def our_network(precision: PrecisionConfig, config: BackboneConfig) -> Network:
    """Return our network with its initial weights, which computes by a recipe."""
    network = Network(config)
    assign_formats(precision, network)
    initialize(network, seed=0)
    return network


def our_step(precision: PrecisionConfig, tokens: Tensor, config: BackboneConfig, depths: int = 0) -> Step:
    """Return a function that trains one step, with so many MTP depths, and returns the loss before it."""
    network = our_network(precision, config)
    optimizer = AdamW(parameter_groups(network, OPTIMIZER.weight_decay), OPTIMIZER)
    ids = torch.zeros_like(tokens, dtype=torch.int32)
    labels = next_token_labels(tokens, ids)
    batch = PackedBatch(tokens=tokens, labels=labels, document_ids=ids)
    counts = count_targets(labels, ids, depths)

    def step() -> Tensor:
        loss = next_token_loss(network, batch, counts, depths, MTP_LOSS_FACTOR).loss
        loss.backward()
        clip_gradients(network.parameters(), OPTIMIZER.gradient_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def their_model() -> Any:
    """Return transformers' model with the weights of `our_network`."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    fields = {
        name: value for name, value in dataclasses.asdict(CONFIG).items() if not name.startswith(("num_next", "mtp_"))
    }
    model = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**fields))
    for layer in model.model.layers:
        if layer.block_type == "linear_attention":
            mixer: Any = layer.mixer
            mixer.time_step_limit = (0.0, float("inf"))
    ours = our_network(PrecisionConfig(recipe="fp32"), CONFIG).state_dict()
    state = {name.replace("backbone.", "model.", 1): tensor for name, tensor in ours.items()}
    state = {name.removesuffix(".weight") if ".experts." in name else name: value for name, value in state.items()}
    model.load_state_dict(state)
    return model.train()


def their_step(precision: str, tokens: Tensor, pure: bool = False) -> Step:
    """Return a function that trains one step as a user of transformers writes it, and returns the loss before it."""
    model = their_model()
    if pure:
        model = model.bfloat16()
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    free = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": OPTIMIZER.weight_decay}, {"params": free, "weight_decay": 0.0}]
    settings: dict[str, Any] = {"lr": OPTIMIZER.learning_rate, "betas": OPTIMIZER.betas, "eps": OPTIMIZER.epsilon}
    optimizer = torch.optim.AdamW(groups, fused=True, **settings)
    autocast = precision == "bf16" and not pure

    def step() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.gradient_clip_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def build_step(side: str, precision: str, tokens: Tensor) -> Step:
    """Return the step of a side."""
    if side == OURS:
        return our_step(PrecisionConfig(recipe=precision), tokens, CONFIG)  # type: ignore[arg-type]
    return their_step(precision, tokens, pure=side == PURE)


def serve(connection: Connection, side: str, precision: str, rows: int, length: int, threads: int) -> None:
    """Take steps on request: the main function of a side's process."""
    if side in (OURS, SETTLED):
        settle_process()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    tokens = torch.randint(CONFIG.vocab_size, (rows, length))
    if side != OURS:
        import transformers  # noqa: F401 (its import is no part of a step's memory)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = build_step(side, precision, tokens)
    losses = [float(step()) for _ in range(2)]
    connection.send(losses)
    while (request := connection.recv()) is not None:
        if request == "step":
            connection.send(timed(step))
        elif request == "memory":
            connection.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
        elif request == "peak":
            connection.send(matmul_peak(precision))
        else:
            connection.send(expensive_operations(step))


def matmul_peak(precision: str) -> tuple[float, float]:
    """Return FLOP per CPU second and per wall second of a large matrix product, best of five."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE).to(dtype) for _ in range(2))
    times = [timed(lambda: a @ b) for _ in range(5)]
    cpu, wall = (2 * PEAK_SIZE**3 / min(column) for column in zip(*times, strict=True))
    return cpu, wall


def expensive_operations(step: Step, count: int = 10) -> list[tuple[str, float]]:
    """Return (name, share of a step's time) of the operations that cost most."""
    with profile(activities=[ProfilerActivity.CPU]) as measured:
        step()
    events = measured.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    rows = sorted(((event.key, event.self_cpu_time_total / total) for event in events), key=lambda row: -row[1])
    return rows[:count]


def compare(names: list[str], precision: str, rows: int, length: int, threads: int, rounds: int) -> None:
    """Print the table of one precision and number of threads."""
    names = [name for name in names if precision == "bf16" or name != PURE]
    sides = [Side(name, serve, name, precision, rows, length, threads) for name in names]
    for _ in range(rounds):
        for side in sides:
            side.turn("step")
    ours = sides[0]
    print(f"\n{precision}, {rows} x {length} tokens, {threads} thread(s), median of {rounds} rounds")
    print(f"{'':<28}{'CPU s':>8}{'wall s':>8}{'CPU ratio':>11}{'wall ratio':>12}{'peak GiB':>10}  first losses")
    for side in sides:
        ratios = [side.ratio(ours, "step", column) for column in range(2)]
        losses = ", ".join(f"{loss:.4f}" for loss in side.ready)
        cpu, wall = (side.median("step", column) for column in range(2))
        print(
            f"{side.name:<28}{cpu:8.3f}{wall:8.3f}{ratios[0]:10.2f}x{ratios[1]:11.2f}x"
            f"{side.ask('memory'):10.2f}  {losses}",
            flush=True,
        )
    flops = training_flops_per_token(CONFIG, length, 0) * rows * length
    peaks = ours.ask("peak")
    shares = [flops / ours.median("step", column) / peaks[column] for column in range(2)]
    print(
        f"matrix products of a step of ours: {flops / 1e9:.1f} GFLOP, {shares[0]:.0%} of the peak by CPU time, "
        f"{shares[1]:.0%} by wall time (peak: {peaks[1] / 1e9:.0f} GFLOP/s)"
    )
    print("most expensive: " + ", ".join(f"{name} {share:.1%}" for name, share in ours.ask("operations")))
    for side in sides:
        side.close()


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4, help="rows of a step (default: 4)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (default: 512)")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each side (default: 7)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (default: 1 2)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="ours is always there (default: all)")
    parser.add_argument("--formats", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for all sides
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in Network(CONFIG).parameters())
    print(f"{size / 1e6:.1f}M parameters, torch {torch.__version__}, {os.cpu_count()} cores")
    for threads in options.threads:
        for precision in options.formats:
            compare(
                list(dict.fromkeys([OURS, *options.sides])),
                precision,
                options.rows,
                options.length,
                threads,
                options.rounds,
            )


if __name__ == "__main__":
    main()
