"""Starting the program in tests, and reading what it left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from modules.checkpoints.training_source import SafeReader

ROOT = Path(__file__).parent.parent.parent
RUN_FILE = """\
name: run
model: {class_path: tests.app.standin.Model}
data: {class_path: tests.app.standin.Data}
trainer: {accelerator: cpu, devices: 1}
console: {every_n_steps: 4}
validation: {every_n_steps: 4}
checkpoint: {every_n_steps: 3}
"""


@dataclass
class Result:
    """What a command left: exit code (negative: the signal that ended it) and everything it printed."""

    code: int
    output: str

    @property
    def unfolded(self) -> str:
        """What it printed, lines that were too long for a terminal in one piece again."""
        return re.sub(r"\n {2,}", " ", self.output)


class Program:
    """The program, ready to be started at once; `start` runs a command in a child process."""

    def __init__(self, folder: Path):
        self.folder = folder
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.app.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self.count = 0

    def run(
        self,
        *args: str | Path,
        meanwhile: Callable[[int], None] | None = None,
        environment: dict[str, str] | None = None,
        folder: Path = ROOT,
    ) -> Result:
        """Run a command in a folder; `meanwhile` gets the process number while it runs."""
        self.count += 1
        output = self.folder / f"output{self.count}.txt"
        command = {
            "args": [str(arg) for arg in args],
            "output": str(output),
            "environment": environment or {},
            "folder": str(folder),
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        if meanwhile is not None:
            meanwhile(pid)
        return Result(int(self.process.stdout.readline()), output.read_text(encoding="utf-8"))

    def output(self) -> str:
        """Return what the newest command has printed so far."""
        file = self.folder / f"output{self.count}.txt"
        return file.read_text(encoding="utf-8") if file.exists() else ""

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until a condition holds; fail after some time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def kill_when(condition: Callable[[], bool], delay: float = 0, number: int = signal.SIGKILL) -> Callable[[int], None]:
    """Return what sends a signal once a condition holds and a delay has passed, unless the process has ended."""

    def meanwhile(pid: int) -> None:
        wait_for(lambda: condition() or not _alive(pid))
        time.sleep(delay)
        if _alive(pid):
            os.kill(pid, number)

    return meanwhile


def losses(file: Path) -> dict[int, set[str]]:
    """Return every loss (in hexadecimal) that was ever computed for each step."""
    found: dict[int, set[str]] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        step, _, loss = line.partition(" ")
        found.setdefault(int(step), set()).add(loss)
    return found


def load_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint folder, unsharded."""
    reader = SafeReader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {}
    for name, entry in entries.items():
        assert isinstance(entry, TensorStorageMetadata)
        tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def same_checkpoint(left: Path, right: Path) -> None:
    """Assert that two checkpoints hold the same bits: weights, optimiser, random numbers, loader and loops."""
    a, b = load_tensors(left), load_tensors(right)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []
    first, second = (torch.load(path / "meta.pt", weights_only=True) for path in (left, right))
    _same(first, second, "")


def _same(left: Any, right: Any, where: str) -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            _same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            _same(a, b, f"{where}[{index}]")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    else:
        assert left == right, where


def scalars(folder: Path, values: bool = False) -> dict[str, list[Any]]:
    """Return the steps (or the values) of each scalar of a run, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [event.value if values else event.step for event in events.Scalars(tag)] for tag in tags}


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
