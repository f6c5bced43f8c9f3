"""Runs of known losses: the table, the spread, the picture, and runs that may not be compared."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageColor
from torch.utils.tensorboard import SummaryWriter

from benchmarks import chart, nvfp4_loss

BASE = {0: 8.0, 40: 4.0, 80: 2.0}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Write a run whose losses are `factor` times those of BASE."""

    def write(name: str, recipe: str, factor: float = 1.0, steps: int = 80, rows: int = 4, seed: int = 0) -> Path:
        config = {
            "name": name,
            "model": {"init_args": {"precision": {"recipe": recipe, "hadamard": True}, "seed": seed}},
            "data": {"init_args": {"global_batch_size": rows, "sequence_length": 16}},
        }
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        with SummaryWriter(str(folder)) as writer:
            for step, loss in BASE.items():
                if step <= steps:
                    writer.add_scalar("validation/loss", loss * (factor if step else 1), step)
            for step in range(1, steps + 1):
                writer.add_scalar("training/next_token_loss", factor * (1 + step % 2), step)
        return folder

    return write


def compare(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["nvfp4_loss", *map(str, arguments)])
    nvfp4_loss.main()


def test_the_table_and_the_picture(run, monkeypatch, capsys, tmp_path: Path):
    compare(monkeypatch, run("plain", "bf16"), run("small", "super", 1.005), "--output", tmp_path)
    out = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert out.startswith(f"{80 * 64:,} tokens")
    assert [line.split()[1:] for line in out.splitlines() if line.startswith("  gap")] == [
        ["+0.00%", "+0.50%", "+0.50%"],
    ]
    mean = (13 * 1 + 12 * 2) / 25  # steps 56 to 80: 1 in the even ones, 2 in the odd ones
    assert rows["plain"] == ["plain", "2.0000", f"{mean:.4f}", "recipe", "bf16"]
    assert rows["small"][1:5] == ["2.0100", "(+0.50%)", f"{1.005 * mean:.4f}", "(+0.50%)"]
    assert "small ends +0.50% from plain: within 1%" in out
    assert "one pair of runs: with another seed the gap is another" in out
    drawn = {color for _, color in Image.open(tmp_path / "nvfp4_loss.png").getcolors(2**24) or ()}
    assert {ImageColor.getrgb(color) for color in chart.COLORS[:2]} <= drawn


def test_several_seeds_have_a_mean_and_a_spread(run, monkeypatch, capsys, tmp_path: Path):
    pairs = [
        (run(f"plain_{seed}", "bf16", base, seed=seed), run(f"small_{seed}", "super", factor * base, seed=seed))
        for seed, (base, factor) in enumerate(((1.0, 1.02), (1.1, 1.0), (0.9, 1.01)))
    ]
    more = [part for pair in pairs[1:] for part in ("--pair", *pair)]
    compare(monkeypatch, *pairs[0], *more, "--output", tmp_path)
    out = capsys.readouterr().out
    assert "3 pairs of runs: +2.00%, -0.00%, +1.00%; mean +1.00%, standard deviation 1.00 points" in out.replace(
        "+0.00%, +1", "-0.00%, +1"
    )
    assert "cannot be ranked" in out


def test_a_large_gap_is_said(run, monkeypatch, capsys, tmp_path: Path):
    compare(monkeypatch, run("plain", "bf16"), run("other", "super", 1.02), "--output", tmp_path)
    assert "other ends +2.00% from plain: NOT within 1%" in capsys.readouterr().out


def test_other_runs_are_not_compared(run, monkeypatch, tmp_path: Path):
    plain = run("plain", "bf16")
    with pytest.raises(SystemExit, match=r"^larger and plain differ in data\.init_args\.global_batch_size; "):
        compare(monkeypatch, plain, run("larger", "super", rows=8))
    with pytest.raises(SystemExit, match=r"^short was validated up to 2,560 tokens and plain up to 5,120; "):
        compare(monkeypatch, plain, run("short", "super", steps=40))
    with pytest.raises(SystemExit, match="no run"):
        compare(monkeypatch, plain, tmp_path / "absent")


def test_ticks_are_round_numbers():
    assert chart.ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert chart.ticks(-0.7, 0.9, 4) == [-0.5, 0, 0.5]
    assert chart.ticks(0, 1_001_472, 6) == [0, 200_000, 400_000, 600_000, 800_000, 1_000_000]


def test_curves_lie_where_their_numbers_do(tmp_path: Path):
    """A rising line goes from the lower left to the upper right of its frame."""
    curve = chart.Curve("", "#ff0000", [0, 1], [0, 1])
    chart.draw([chart.Panel("y", [curve], 200)], "x", tmp_path / "line.png")
    y, x = np.nonzero((np.asarray(Image.open(tmp_path / "line.png")) == (255, 0, 0)).all(-1))
    assert x.min() < chart.LEFT + 20
    assert y[x.argmin()] > chart.TOP + 180
    assert x.max() > chart.WIDTH - chart.RIGHT - 20
    assert y[x.argmax()] < chart.TOP + 20
