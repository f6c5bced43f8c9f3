"""What the dashboards cost: CPU seconds inside their callbacks over those of the training steps around them.

    python -m benchmarks.metrics_cost [--config configs/pretrain.yaml] [--steps 40]

Two runs with and without them would differ by more than this from the machine's noise alone; so one run is made and
every call into them is timed (`Speed`, `DataUse`, `Health` with what it looks at in the layers, `Dashboard`).
`QuantizationHealth` also makes the quantisers work harder; so it looks at every second step here, and the medians of
steps with and without it are compared.
"""

import argparse
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from app.__main__ import settle_process
from app.cli import RunCLI, parse_run
from callbacks.dashboard import Dashboard
from callbacks.data_use import DataUse
from callbacks.health import Health, Observation
from callbacks.speed import Speed
from callbacks.step import StepCallback

MEASURED = (Speed, DataUse, Health, Dashboard, Observation)
AT_THE_START = ("on_train_start", "setup")


class Cost(StepCallback):
    """CPU seconds of the steps and inside the measured classes."""

    def __init__(self) -> None:
        self.inside, self._depth = 0.0, 0
        self.marks: list[tuple[float, float]] = []

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that adds its CPU seconds to `inside`; calls inside it are part of it."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started, self._depth = time.process_time(), self._depth + 1
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.inside += time.process_time() - started

        return timed

    def on_step_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Note where the clocks stand."""
        self.marks.append((time.process_time(), self.inside))


def main() -> None:
    """Run and print the share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/pretrain.yaml", help="run file (default: the tiny model's)")
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps (default: 40)")
    options = parser.parse_args()
    settle_process()
    cost = Cost()
    for kind in MEASURED:
        for name, function in list(vars(kind).items()):
            if callable(function) and (name.startswith("on_") or name == "add") and name not in AT_THE_START:
                setattr(kind, name, cost.wrap(function))
    build = RunCLI._build
    RunCLI._build = lambda self, callbacks, logger, checkpoint: build(self, [*callbacks, cost], logger, checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        keys = [f"--trainer.max_steps={options.steps}", f"--trainer.default_root_dir={folder}", "--name=cost"]
        keys += [
            "--validation.every_n_steps=1000000",
            "--checkpoint.every_n_steps=1000000",
            "--samples.max_new_tokens=0",
            "--data.init_args.validation_rows=4",
        ]
        interval = parse_run(["--config", options.config]).config.quantization_health.every_n_steps
        RunCLI(["--config", options.config, *keys, "--quantization_health.every_n_steps=2"]).run()
    (start, start_inside), (end, end_inside) = cost.marks[0], cost.marks[-2]  # the last step ends with a validation
    steps, inside = end - start, end_inside - start_inside
    print(
        f"{len(cost.marks) - 2} steps: {steps:.2f} CPU s, {inside:.3f} of them in the dashboards: {inside / steps:.2%}"
    )
    seconds = [after - before for (before, _), (after, _) in itertools.pairwise(cost.marks[:-1])]  # from step 2 on
    watched, plain = statistics.median(seconds[::2]), statistics.median(seconds[1::2])
    print(
        f"a step that QuantizationHealth looks at: {watched:.3f} CPU s instead of {plain:.3f}; every {interval} steps: "
        f"{(watched - plain) / plain / interval:.2%}"
    )


if __name__ == "__main__":
    main()
