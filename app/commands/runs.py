"""What became of the runs in a folder, and in what two of them differ. Imports nothing slow."""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from app.run_folder import ROOT, RunFolder, differences, read_config
from modules.checkpoints import folder
from modules.errors import UserError

WIDTH = 100
"""Columns of a line."""
HEADER = ("run", "state", "step", "loss", "bits/byte", "best step", "size", "written")


def runs(path: Path = ROOT, other: Path | None = None) -> None:
    """List runs with state, step, metrics and size, or compare two.

    Given a folder of runs: a line for each run, that written last first. State: running; finished; stopped (the same
    fit command goes on); no checkpoint (none was saved yet); damaged (its newest checkpoint: fit goes on from the one
    before it). Loss (nats per token) and bits per byte are of the last validation before the newest checkpoint; `best
    step` is where the link checkpoints/best leads (checkpoint.keep_best). The size is that of all files of the run.

    Given two runs or checkpoints: what differs in their configurations, a key a line.

    Args:
        path: Folder of runs; or a run (its folder, or its name in runs/) or a checkpoint, to compare.
        other: Run or checkpoint to compare with.

    Raises:
        UserError: there is no such folder, or no run in it.
    """
    if other is not None:
        one, two = _configuration(path), _configuration(other)
        lines = differences(one, read_config(two))
        print(f"{one} -> {two}")
        print("\n".join(lines) if lines else "no difference")
        return
    if not path.is_dir():
        raise UserError(f"path: {path} is no folder; name one that holds runs (trainer.default_root_dir)")
    rows = [describe(RunFolder(path, run.name)) for run in path.iterdir() if _is_run(run)]
    if not rows:
        mend = "; compare it with another: runs ONE OTHER" if _is_run(path) else "; fit makes runs"
        raise UserError(f"path: {path} holds no runs{mend}")
    print("\n".join(table(sorted(rows, key=lambda row: row[-1], reverse=True))))


def describe(run: RunFolder) -> tuple[str, ...]:
    """Return the cells of a run, as `HEADER`; no tensor is read, and no file as a whole."""
    checkpoint, damaged = folder.newest(run.checkpoints, whole=False)
    about: dict[str, Any] = {} if checkpoint is None else folder.describe(checkpoint)
    state = "finished" if about.get("finished") else "stopped" if about else "no checkpoint"
    if damaged:
        state = "damaged"
    if run.is_locked:
        state = "running"
    files = list(_files(run.path))
    metrics = about.get("metrics") or {}
    best = run.checkpoints / folder.BEST
    step = "" if checkpoint is None else f"{folder.step_of(checkpoint):,} of {about.get('last_step', 0):,}"
    loss, bits = (metrics.get(f"validation/{name}") for name in ("loss", "bits_per_byte"))
    return (
        run.name,
        state,
        step,
        "" if loss is None else f"{loss:.4f}",
        "" if bits is None else f"{bits:.4f}",
        f"{folder.step_of(best.resolve()):,}" if best.exists() else "",
        _size(sum(file.st_size for file in files)),
        time.strftime("%Y-%m-%d %H:%M", time.localtime(max((file.st_mtime for file in files), default=0))),
    )


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Return the lines of the list, `WIDTH` columns wide at most: long names are cut in the middle."""
    kept = [column for column in range(len(HEADER)) if column == 0 or any(row[column] for row in rows)]
    widths = {column: max(len(HEADER[column]), *(len(row[column]) for row in rows)) for column in kept}
    widths[0] = min(widths[0], WIDTH - sum(widths[column] + 2 for column in kept[1:]))
    lines = []
    for cells in [HEADER, *rows]:
        name = cells[0]
        if len(name) > widths[0]:
            name = f"{name[: widths[0] // 2]}…{name[-(widths[0] - widths[0] // 2 - 1) :]}"
        parts = [f"{name:<{widths[0]}}", f"{cells[1]:<{widths[1]}}"]
        parts += [f"{cells[column]:>{widths[column]}}" for column in kept[2:]]
        lines.append("  ".join(parts).rstrip())
    return lines


def _is_run(path: Path) -> bool:
    return (path / folder.RUN_CONFIG).is_file() or (path / folder.CHECKPOINTS).is_dir()


def _files(run: Path) -> Iterator[os.stat_result]:
    """Yield what is known of each file; a run that goes on may remove one meanwhile."""
    for place, _, names in os.walk(run):
        for name in names:
            with suppress(FileNotFoundError):
                yield os.lstat(os.path.join(place, name))


def _configuration(path: Path) -> Path:
    """Return the folder with the configuration of a run or checkpoint."""
    for place in (path, ROOT / path):
        if (place / folder.RUN_CONFIG).is_file():
            return place
    raise UserError(f"{path} is no run and no checkpoint: it holds no {folder.RUN_CONFIG}")


def _size(size: float) -> str:
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"
