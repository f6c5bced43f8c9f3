"""What emulated NVFP4 costs on a CPU: a quantiser, a linear layer, a whole training step.

    python -m benchmarks.nvfp4_emulation [--parts quantiser linear step] [--sizes 1024 2048 4096] [--formats bf16]
        [--threads 1 2] [--rounds 3]

Quantiser: to NVFP4 and back, against torchao's (`NVFP4Tensor.to_nvfp4` with a scale a tensor and `dequantize`) and a
plain copy of memory. All round every matrix to the nearest in blocks of 1x16 and return it in its dtype; "equal" is the
share of numbers that are ours to five digits (torchao breaks ties in another way). Below: what else training asks of a
quantiser, on our side alone, each with the ratio to our first row.
Linear layer: see `benchmarks.nvfp4_linears`. Training step: see `benchmarks.nvfp4_steps`.
torchao's runs eager and through torch.compile, whose time is printed (that of the first call); ours eager, with its C
code, whose time of compilation is printed too, and, as without a compiler, in torch alone ("portable"). Each side lives
in a process of its own and takes turns; a ratio is the median of the ratios of neighbouring turns. All have our
settings of memory and threads (`app.__main__.settle_process`).
"""

import argparse
import functools
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import nvfp4_linears, nvfp4_steps
from benchmarks.nvfp4_sides import COMPILED, OURS, PLAIN, PORTABLE, SIDES, compilation_seconds, enter, torchao_leaves
from benchmarks.side import Side, start_together, timed
from benchmarks.training_step import models
from modules.ops.native import quantization
from modules.ops.native.quantization import Options
from modules.precision import nvfp4

PARTS = ["quantiser", "linear", "step"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
USES = {
    "weight, 16x16": Options(tiles=True),
    "gradient, stochastic": Options(rounding="stochastic"),
    "activation, transform along tokens": Options(axis=-2, hadamard=True),
    "gradient, transform along tokens, stochastic": Options(axis=-2, hadamard=True, rounding="stochastic"),
    "four over six": Options(four_over_six="mse"),
}
"""What training and calibration ask for beside rounding an activation to the nearest."""
NUMBERS_A_TURN = 2**22
"""A turn takes so many calls that they round about this many numbers."""
Function = Callable[[Tensor], Tensor]


class Request(NamedTuple):
    """A turn: the name of a function, and the matrix it takes."""

    function: str
    precision: str
    size: int


def functions_of(side: str) -> dict[str, Function]:
    """Return what a side can be asked for; "" is rounding to the nearest."""
    if side in (OURS, PORTABLE):
        every = {"": Options(), **USES}
        return {use: functools.partial(nvfp4.quantize_dequantize, options=options) for use, options in every.items()}
    if side == PLAIN:
        return {"": torch.clone}
    return {"": torch.compile(torchao_leaves, dynamic=False) if side == COMPILED else torchao_leaves}


def matrix(precision: str, size: int) -> Tensor:
    """Return the matrix all sides take."""
    return torch.randn(size, size, generator=torch.Generator().manual_seed(size)).to(DTYPES[precision])


def serve(connection: Connection, side: str, threads: int) -> None:
    """Answer requests with the seconds of a call, or (as "left") with what is left of the matrix."""
    enter(side, threads)
    functions = functions_of(side)
    x, last = torch.empty(0), None
    connection.send(None)
    while (message := connection.recv()) is not None:
        answer, request = message
        function = functions[request.function]
        if (request.precision, request.size) != last:
            last = (request.precision, request.size)
            x = matrix(*last)
        if answer == "left":
            connection.send(function(x))
        elif answer == "first":
            connection.send(timed(lambda f=function, x=x: f(x))[1])
        else:
            calls = max(1, NUMBERS_A_TURN // x.numel())
            times = timed(lambda f=function, x=x, calls=calls: [f(x) for _ in range(calls)] and None)
            connection.send(tuple(seconds / calls for seconds in times))


def compare(names: list[str], precisions: list[str], sizes: list[int], threads: int, rounds: int) -> None:
    """Print the tables of one number of threads."""
    sides = start_together(dict.fromkeys([OURS, *names]), serve, threads)
    for precision in precisions:
        for size in sizes:
            print(f"\nquantiser, {size} x {size} {precision}, {threads} thread(s), {rounds} rounds, median ms a call")
            print(f"{'':<48}{'CPU':>9}{'wall':>9}{'CPU ratio':>11}{'wall ratio':>12}  {'equal':>8}")
            compare_matrix(sides, Request("", precision, size), rounds)
    for side in sides:
        side.close()


def compare_matrix(sides: list[Side], request: Request, rounds: int) -> None:
    """Print the table of one matrix."""
    first = {side.name: side.ask(("first", request)) for side in sides}
    turn = ("turn", request)
    for _ in range(rounds):
        for side in sides:
            side.turn(turn)
    ours = sides[0]
    expected = ours.ask(("left", request))
    for side in sides:
        equal = torch.isclose(side.ask(("left", request)), expected, rtol=1e-5, atol=0).float().mean().item()
        note = f"  first call {first[side.name]:.1f} s" if side.name == COMPILED else ""
        print_row("copy" if side.name == PLAIN else side.name, side, turn, ours, turn, f"{equal:8.2%}{note}")
    for use in USES:
        other = ("turn", request._replace(function=use))
        ours.ask(other)
        for _ in range(rounds):
            ours.turn(other)
        print_row(f"  {use}", ours, other, ours, turn, "")


def print_row(name: str, side: Side, request: object, base: Side, base_request: object, note: str) -> None:
    """Print a row: median milliseconds, and ratios of neighbouring turns to those of `base`."""
    if request == base_request:
        ratios = [side.ratio(base, request, column) for column in range(2)]
    else:
        ratios = [side.median(request, column) / base.median(base_request, column) for column in range(2)]
    milliseconds = [side.median(request, column) * 1000 for column in range(2)]
    print(
        f"{name:<48}{milliseconds[0]:9.2f}{milliseconds[1]:9.2f}{ratios[0]:10.2f}x{ratios[1]:11.2f}x  {note}",
        flush=True,
    )


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096], help="rows and columns of a matrix")
    parser.add_argument(
        "--formats", nargs="+", choices=list(DTYPES), default=["bf16"], help="dtypes of the quantiser's (default: bf16)"
    )
    parser.add_argument("--models", nargs="+", choices=list(models()), default=list(models()), help="of the step")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (default: 1 2)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="ours is always there (default: all)")
    options = parser.parse_args()
    status = quantization.load()[1]
    if status == "active":
        status += f" (compiled in {compilation_seconds():.1f} s, once a machine)"
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, C code: {status}")
    for threads in options.threads:
        if "quantiser" in options.parts:
            compare(options.sides, options.formats, options.sizes, threads, options.rounds)
        if "linear" in options.parts:
            nvfp4_linears.compare(options.sides, options.sizes, threads, options.rounds)
        if "step" in options.parts:
            for model in options.models:
                nvfp4_steps.compare(model, threads, options.rounds)


if __name__ == "__main__":
    main()
