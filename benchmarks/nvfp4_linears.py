"""A linear layer whose inputs and weight are rounded to NVFP4, against torchao's `NVFP4FakeQuantizedLinear`.

Part of `python -m benchmarks.nvfp4_emulation`. Both round both operands of the forward product, and in the backward
pass multiply in bf16 what that left of them. Ours is `precision.linear.Linear` as a recipe leaves it whose backward
pass is switched to bf16, with weights in blocks of 1x16, as torchao has them, and of 16x16; beside it the layer of the
published training recipe, which rounds the operands of all three products. Weights are bf16 on all sides, as FSDP2
gathers them. torchao rounds what is left of an operand to bf16, ours does not: results differ by that, and by ties.
"""

from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.nvfp4_sides import COMPILED, OURS, PLAIN, PORTABLE, TORCHAO, enter, torchao_linear
from benchmarks.side import Side, start_together, timed
from modules.precision.backends import EMULATED
from modules.precision.linear import Linear
from modules.precision.scheme import Arithmetic, Products, Scheme

TOKENS = 1024
Passes = Literal["forward", "both"]
STRAIGHT = Products("nvfp4", "bf16", "bf16")
KINDS: dict[str, tuple[Products, bool]] = {
    "": (STRAIGHT, False),
    "weight 16x16": (STRAIGHT, True),
    "all three products": (Products.all_in("nvfp4"), True),
}
"""Our layers: formats, and whether block scales of the weight cover 16x16; the first does what torchao's does."""
ASKED: dict[Passes, float] = {"forward": 2.0, "both": 1.5}
"""How many times as fast as torchao's ours has to be, at widths 1024 and 2048."""


class Request(NamedTuple):
    """A turn: which layer, of how many in- and out-features, which passes."""

    kind: str
    size: int
    passes: Passes


class Case:
    """A layer with its inputs and the gradient of its results.

    Args:
        side: whose layer.
        kind: see KINDS; "" on other sides than ours.
        size: in- and out-features.
    """

    def __init__(self, side: str, kind: str, size: int) -> None:
        generator = torch.Generator().manual_seed(size)
        draw = lambda rows: torch.randn(rows, size, generator=generator)  # noqa: E731
        self.x, self.gradient = draw(TOKENS).bfloat16().requires_grad_(), draw(TOKENS).bfloat16()
        self.layer: Any = layer_of(side, kind, (draw(size) * size**-0.5).bfloat16())

    def run(self, passes: Passes) -> tuple[Tensor, ...]:
        """Return the results, or the gradients of inputs and weight."""
        y = self.layer(self.x)
        return (y,) if passes == "forward" else torch.autograd.grad(y, (self.x, self.layer.weight), self.gradient)


def layer_of(side: str, kind: str, weight: Tensor) -> nn.Module:
    """Return the layer of a side."""
    if side in (TORCHAO, COMPILED):
        layer = torchao_linear(weight)
        return torch.compile(layer, dynamic=False) if side == COMPILED else layer  # type: ignore[return-value]
    layer = Linear(weight.shape[1], weight.shape[0])
    layer.weight, layer.format = nn.Parameter(weight), "bf16"
    if side in (OURS, PORTABLE):
        products, tiles = KINDS[kind]
        layer.format, layer.product = "nvfp4", Scheme(products, Arithmetic(two_dimensional_weights=tiles), EMULATED)
    return layer


def serve(connection: Connection, side: str, threads: int) -> None:
    """Answer requests with the seconds of a call, of the first one, or (as "left") with results and gradients."""
    enter(side, threads)
    cases: dict[tuple[str, int], Case] = {}
    connection.send(None)
    while (message := connection.recv()) is not None:
        answer, (kind, size, passes) = message
        if (kind, size) not in cases:
            cases = {key: case for key, case in cases.items() if key[1] == size}
            cases[kind, size] = Case(side, kind, size)
        case = cases[kind, size]
        if answer == "left":
            connection.send([tensor.detach() for tensor in (*case.run("forward"), *case.run("both"))])
        else:
            connection.send(timed(lambda case=case, passes=passes: case.run(passes)))


def compare(names: list[str], sizes: list[int], threads: int, rounds: int) -> None:
    """Print the tables of one number of threads."""
    sides = start_together(dict.fromkeys([OURS, *names]), serve, threads)
    for size in sizes:
        print(
            f"\nlinear layer {size} x {size}, {TOKENS} tokens, bf16, {threads} thread(s), {rounds} rounds, median ms "
            "a call, ratios and differences to the first row"
        )
        print(f"{'':<28}{'forward':^38}  {'forward + backward':^38}  relative difference")
        print(f"{'':<28}" + f"{'CPU':>8}{'wall':>8}{'CPU ratio':>11}{'wall ratio':>11}  " * 2 + "   y      dx      dW")
        compare_size(sides, size, rounds)
    for side in sides:
        side.close()


def compare_size(sides: list[Side], size: int, rounds: int) -> None:
    """Print the table of one size."""
    rows = [(side, kind) for side in sides for kind in (KINDS if side.name == OURS else [""])]
    first = {}
    for side, kind in rows:
        seconds = [side.ask(("first", Request(kind, size, passes)))[1] for passes in ASKED]
        first[side.name] = sum(seconds)
    for _ in range(rounds):
        for side, kind in rows:
            for passes in ASKED:
                side.turn(("turn", Request(kind, size, passes)))
    expected = sides[0].ask(("left", Request("", size, "both")))
    for side, kind in rows:
        left = side.ask(("left", Request(kind, size, "both")))
        differences = [relative_difference(*pair) for pair in zip(left, expected, strict=True)]
        cells = [cell for passes in ASKED for cell in row_cells(side, sides[0], Request(kind, size, passes))]
        note = f"  first call {first[side.name]:.1f} s" if side.name == COMPILED else ""
        name = f"  {kind}" if kind else side.name
        print(f"{name:<28}{''.join(cells)}" + "".join(f"{share:8.2%}" for share in differences) + note, flush=True)
    print_summary({side.name: side for side in sides}, size)


def relative_difference(x: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over that of `expected`."""
    return ((x.float() - expected.float()).norm() / expected.float().norm()).item()


def row_cells(side: Side, ours: Side, request: Request) -> list[str]:
    """Return milliseconds by CPU and clock, and both ratios, as text."""
    cells = [f"{side.median(('turn', request), column) * 1000:8.2f}" for column in range(2)]
    return cells + [f"{ratio(side, ours, request, column):10.2f}x" for column in range(2)] + ["  "]


def ratio(side: Side, base: Side, request: Request, column: int) -> float:
    """Return how many times as long as the first kind of `base` a side takes: the median over neighbouring turns."""
    mine, its = side.times["turn", request], base.times["turn", request._replace(kind="")]
    ratios = sorted(a[column] / b[column] for a, b in zip(mine, its, strict=True))
    return (ratios[(len(ratios) - 1) // 2] + ratios[len(ratios) // 2]) / 2


def print_summary(sides: dict[str, Side], size: int) -> None:
    """Print what is asked for beside what is measured, where torchao's layer took part."""
    for name, words in ((TORCHAO, "eager"), (COMPILED, "compiled")):
        if name not in sides:
            continue
        parts = []
        for passes, asked in ASKED.items():
            request = Request("", size, passes)
            cpu, wall = (ratio(sides[name], sides[OURS], request, column) for column in range(2))
            text = f"{'forward' if passes == 'forward' else 'forward + backward'} {cpu:.2f}x CPU, {wall:.2f}x wall"
            if PLAIN in sides:
                ceiling = [ratio(sides[name], sides[PLAIN], request, column) for column in range(2)]
                text += f" (ceiling {ceiling[0]:.2f}x, {ceiling[1]:.2f}x"
                text += f"; asked {asked}x)" if name == TORCHAO and size <= 2048 else ")"
            parts.append(text)
        print(f"ours against torchao, {words}: {'; '.join(parts)}")
