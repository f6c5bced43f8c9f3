"""The table at the start: on what the run computes, with which kernels, in which formats.

Most slow runs are slow because a kernel is missing, and most surprising numbers come from a format nobody looked at.
"""

import platform

import torch
from lightning.pytorch import LightningModule, Trainer

from callbacks.speed import Speed
from callbacks.step import StepCallback, stage, step_loop
from modules.base import StageModule
from modules.ops.kernels import kernel_table
from modules.precision.table import precision_lines


class Startup(StepCallback):
    """Prints what is active before training starts.

    Args:
        speed: knows the peak that the speed is compared with, once training starts.
    """

    order = -5

    def __init__(self, speed: Speed) -> None:
        self.speed = speed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table."""
        if trainer.is_global_zero:
            table = rows(trainer, stage(pl_module)) + self.speed.describe()
            print("\n".join(f"{name:<12}{text}" for name, text in table), flush=True)


def rows(trainer: Trainer, module: StageModule) -> list[tuple[str, str]]:
    """Return the lines of the table as (name, text)."""
    device = trainer.strategy.root_device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    table = [
        ("run", str(trainer.default_root_dir)),
        ("device", f"{trainer.world_size} x {device.type} ({kind}), {torch.get_num_threads()} threads"),
        ("torch", str(torch.__version__)),
    ]
    table += [("kernel", f"{operation}: {kernel}: {state}") for operation, kernel, state in kernel_table()]
    table += [("weights", line) for line in module.initial_weights]
    lines = precision_lines(module.precision_table, module.built_network, module.mtp_depths, by_module=False)
    table += [("precision", line) for line in lines]
    count = sum(parameter.numel() for parameter in module.parameters())
    return [*table, ("parameters", f"{count:,}"), ("steps", f"{step_loop(trainer).last_step:,}")]
