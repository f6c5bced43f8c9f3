"""A whole training step with the products of linear layers in emulated NVFP4, against the same step in bf16.

Part of `python -m benchmarks.nvfp4_emulation`; models and steps are those of `benchmarks.training_step`. "Every linear"
rounds the operands of all three products of every linear layer and expert, with the published arithmetic (stochastic
rounding, rotation, 16x16 scales of weights); embeddings and head have no such format. Beside it the published recipe.
"""

import os
from multiprocessing.connection import Connection

import torch

from benchmarks.nvfp4_sides import OURS, PORTABLE, enter
from benchmarks.side import start_together, timed
from benchmarks.training_step import models, our_step
from modules.precision.recipe import PrecisionConfig, PrecisionRule

EVERY = PrecisionConfig(
    recipe=None,
    rules=[
        PrecisionRule(pattern="*embeddings", format="bf16"),
        PrecisionRule(pattern="lm_head", format="bf16"),
        PrecisionRule(pattern="*", format="nvfp4"),
    ],
    bf16_tail=0,
    backend="emulated",
)
RECIPES: dict[str, tuple[PrecisionConfig, str]] = {
    "bf16": (PrecisionConfig(recipe="bf16"), OURS),
    "NVFP4, every linear": (EVERY, OURS),
    "NVFP4, published recipe": (PrecisionConfig(recipe="super", backend="emulated"), OURS),
    "NVFP4, every linear, portable": (EVERY, PORTABLE),
}
"""Recipe of each row, and with which quantisers; the first is what the others are compared with."""
ASKED = 2.5
"""How many times as long as in bf16 a step may take with every linear in NVFP4."""
ROWS, LENGTH = 4, 512


def serve(connection: Connection, name: str, model: str, threads: int) -> None:
    """Take steps on request: the main function of a row's process."""
    recipe, side = RECIPES[name]
    enter(side, threads)
    config, depths = models()[model]
    generator = torch.Generator().manual_seed(0)
    step = our_step(recipe, torch.randint(config.vocab_size, (ROWS, LENGTH), generator=generator), config, depths)
    connection.send([float(step()) for _ in range(2)])
    while connection.recv() is not None:
        connection.send(timed(step))


def compare(model: str, threads: int, rounds: int) -> None:
    """Print the table of one model and number of threads."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for all sides
    sides = start_together(RECIPES, serve, model, threads)
    for _ in range(rounds):
        for side in sides:
            side.turn("step")
    print(f"\ntraining step, {model} model, {ROWS} x {LENGTH} tokens, {threads} thread(s), median of {rounds} rounds")
    print(f"{'':<32}{'CPU s':>8}{'wall s':>8}{'CPU ratio':>11}{'wall ratio':>12}  first losses")
    for side in sides:
        cpu, wall = (side.median("step", column) for column in range(2))
        ratios = [side.ratio(sides[0], "step", column) for column in range(2)]
        asked = f"  (asked: at most {ASKED}x)" if side is sides[1] else ""
        losses = ", ".join(f"{loss:.4f}" for loss in side.ready)
        print(f"{side.name:<32}{cpu:8.3f}{wall:8.3f}{ratios[0]:10.2f}x{ratios[1]:11.2f}x  {losses}{asked}", flush=True)
    for side in sides:
        side.close()
