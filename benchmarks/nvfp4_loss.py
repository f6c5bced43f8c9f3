"""Losses of a run in NVFP4 beside those of the same run in bf16: a table, and the curves in a picture.

    python -m app fit --config configs/pretrain_nvfp4.yaml
    python -m app fit --config configs/pretrain_nvfp4.yaml --name pretrain_bf16 --model.init_args.precision.recipe bf16
    python -m benchmarks.nvfp4_loss runs/pretrain_bf16 runs/pretrain_nvfp4 [--pair BASE RUN ...] [--output docs]

Reads what the runs wrote for TensorBoard. They must have seen the same tokens, and be configured alike in everything
but `model.init_args.precision`. A gap is a run's loss over that of the first run, minus one. Writes nvfp4_loss.png.
A gap of one pair of runs says little: with another seed (`--model.init_args.seed`, `--data.init_args.seed`,
`--seed_everything`, the same for both runs of a pair) it is another. Each `--pair` adds such a pair, and the mean and
spread of all their last gaps are printed. To compare two recipes, compare these: a difference within the spread is no
difference.
"""

import argparse
from itertools import accumulate
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import yaml

from benchmarks.chart import COLORS, Curve, Panel, draw

ASKED = 0.01
"""Largest gap of the last validation."""
WINDOW = 25
"""Steps that a smoothed training loss is the mean of."""
PRECISION = "model.init_args.precision."


class Run(NamedTuple):
    """What a run left behind."""

    name: str
    config: dict[str, Any]
    """By dotted key."""
    validation: dict[int, float]
    """Nats per token, by tokens seen."""
    training: dict[int, float]
    """Nats per token, by tokens seen: mean of the `WINDOW` newest steps."""


def read(folder: Path) -> Run:
    """Read a run's folder; exits with one line where it is none."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not (folder / "config.yaml").is_file():
        raise SystemExit(f"{folder}: no run (it has no config.yaml); name a folder that fit wrote")
    config = flat(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    tokens = config["data.init_args.global_batch_size"] * config["data.init_args.sequence_length"]
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    curves = []
    for tag in ("validation/loss", "training/next_token_loss"):
        if tag not in events.Tags()["scalars"]:
            raise SystemExit(f"{folder}: it has logged no {tag}; let the run come to its first validation")
        curves.append({event.step * tokens: event.value for event in events.Scalars(tag)})
    return Run(config["name"], config, curves[0], smoothed(curves[1]))


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted key."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {key: leaf for name, branch in tree.items() for key, leaf in flat(branch, f"{prefix}{name}.").items()}


def smoothed(curve: dict[int, float]) -> dict[int, float]:
    """Return the means over the newest `WINDOW` points, from where there are so many."""
    sums = [0.0, *accumulate(curve.values())]
    width = min(WINDOW, len(curve))
    averages = [(after - before) / width for before, after in zip(sums, sums[width:], strict=False)]
    return dict(zip([*curve][width - 1 :], averages, strict=True))


def check_alike(runs: list[Run]) -> None:
    """Exit with one line unless the runs saw the same tokens in the same way."""
    first = runs[0]
    for run in runs[1:]:
        keys = sorted({*first.config, *run.config})
        different = [key for key in keys if first.config.get(key) != run.config.get(key)]
        other = [key for key in different if key != "name" and not key.startswith(PRECISION)]
        if other:
            raise SystemExit(f"{run.name} and {first.name} differ in {other[0]}; compare runs that differ in precision")
        if [*run.validation] != [*first.validation]:
            ends = [f"{max(one.validation):,}" for one in (run, first)]
            raise SystemExit(
                f"{run.name} was validated up to {ends[0]} tokens and {first.name} up to {ends[1]}; "
                "compare runs of the same length"
            )


def gaps(curve: dict[int, float], base: dict[int, float]) -> dict[int, float]:
    """Return the relative gap to another curve at each place that both have."""
    return {tokens: loss / base[tokens] - 1 for tokens, loss in curve.items() if tokens in base}


def precision_of(run: Run, other: Run) -> str:
    """Return in what the precision of a run differs from another's."""
    keys = [key for key in run.config if key.startswith(PRECISION) and run.config[key] != other.config.get(key)]
    return ", ".join(f"{key.removeprefix(PRECISION)} {str(run.config[key]).lower()}" for key in keys)


def print_table(runs: list[Run]) -> None:
    """Print the validation losses and gaps of runs; the first is the base."""
    base = runs[0]
    print(f"{max(base.validation):,} tokens; the runs differ in model.init_args.precision alone. Nats per token:\n")
    wide = max(len(run.name) for run in runs) + 2
    print(f"{'validation after tokens':<{wide + 6}}" + "".join(f"{tokens:>11,}" for tokens in base.validation))
    for run in runs:
        print(f"{run.name:<{wide + 6}}" + "".join(f"{loss:11.4f}" for loss in run.validation.values()))
        if run is not base:
            shares = gaps(run.validation, base.validation).values()
            print(f"{'  gap':<{wide + 6}}" + "".join(f"{share:+11.2%}" for share in shares))
    print(f"\n{'':<{wide}}{'last validation':>24}{f'last {WINDOW} training steps':>28}  precision")
    for run in runs:
        ends = [(curve, [*curve][-1]) for curve in (run.validation, run.training)]
        cells = [f"{curve[end]:.4f}" for curve, end in ends]
        if run is not base:
            pairs = zip(ends, (base.validation, base.training), strict=True)
            cells = [f"{cell} ({c[end] / b[end] - 1:+.2%})" for cell, ((c, end), b) in zip(cells, pairs, strict=True)]
        print(f"{run.name:<{wide}}{cells[0]:>24}{cells[1]:>28}  {precision_of(run, runs[run is base])}")


def last_gap(base: Run, run: Run) -> float:
    """Return the gap of the last validation."""
    return [*gaps(run.validation, base.validation).values()][-1]


def spread_lines(ends: list[float]) -> list[str]:
    """Return what the last gaps of pairs of runs say together."""
    if len(ends) == 1:
        return ["one pair of runs: with another seed the gap is another (--pair BASE RUN adds a pair)"]
    each = ", ".join(f"{end:+.2%}" for end in ends)
    return [
        f"{len(ends)} pairs of runs: {each}; mean {mean(ends):+.2%}, standard deviation {100 * stdev(ends):.2f} points",
        "Recipes whose means differ by less than that spread cannot be ranked.",
    ]


def picture(base: Run, run: Run, path: Path) -> None:
    """Draw the losses of two runs, and below them the gap."""
    above = []
    for one, color in zip((base, run), COLORS, strict=False):
        name = f"{one.name}, training, mean of {WINDOW} steps"
        above.append(Curve(name, blend(color), *columns(one.training), points=False))
        above.append(Curve(f"{one.name}, validation", color, *columns(one.validation)))
    below = [
        Curve("", COLORS[0], [0, max(base.validation)], [0, 0], points=False),
        Curve("training", blend(COLORS[1]), *percent(gaps(run.training, base.training)), points=False),
        Curve("validation", COLORS[1], *percent(gaps(run.validation, base.validation))),
    ]
    draw([Panel("nats per token", above, 360), Panel(f"gap to {base.name}, %", below, 200)], "tokens", path)
    print(f"wrote {path}")


def blend(color: str) -> str:
    """Return a colour a third of the way to white."""
    return "#" + "".join(f"{(2 * int(color[i : i + 2], 16) + 255) // 3:02x}" for i in (1, 3, 5))


def columns(curve: dict[int, float]) -> tuple[list[int], list[float]]:
    """Return places and values of a curve."""
    return [*curve], [*curve.values()]


def percent(curve: dict[int, float]) -> tuple[list[int], list[float]]:
    """Return places and values in per cent."""
    return [*curve], [100 * value for value in curve.values()]


def main() -> None:
    """Parse the command line, print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, nargs="?", default=Path("runs/pretrain_bf16"), help="run in bf16")
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/pretrain_nvfp4"), help="run in NVFP4")
    parser.add_argument(
        "--pair", type=Path, nargs=2, action="append", default=[], metavar=("BASE", "RUN"), help="the same, other seeds"
    )
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of the picture (default: docs)")
    options = parser.parse_args()
    pairs = [[read(folder) for folder in pair] for pair in ((options.base, options.run), *options.pair)]
    for pair in pairs:
        check_alike(pair)
        print_table(pair)
        print()
    ends = [last_gap(*pair) for pair in pairs]
    base, run = pairs[0]
    verdict = "within" if abs(mean(ends)) <= ASKED else "NOT within"
    print(f"{run.name} ends {mean(ends):+.2%} from {base.name}: {verdict} {ASKED:.0%}")
    print("\n".join(spread_lines(ends)))
    picture(base, run, options.output / "nvfp4_loss.png")


if __name__ == "__main__":
    main()
