"""The memory of a device as a table."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial

from app.planning.memory import StepMemory, measure_rows
from app.planning.text import align, byte_unit
from app.strategies import ShardedStrategy
from modules.base import StageModule

THIS_RUN = "this run"
"""Column of the run as it is."""
_ROWS = {
    "weights, fp32": "weights",
    "gradients": "gradients",
    "optimiser state": "optimizer",
    "micro-batches": "batch",
    "activations kept for the backward pass": "kept",
    "more at the peak": "passing",
    "peak of a step": "peak",
    "peak of the first step": "first_peak",
    "most held by the loss (logits in chunks)": "loss_peak",
    "most whole weights that FSDP2 holds": "gathered_peak",
}

_MUCH_PADDING = 0.05
_DEVICES = {"cuda": ("GPU", "GPUs"), "cpu": ("CPU process", "CPU processes")}
"""Kind -> a device, several devices."""


def measure_columns(
    module: StageModule,
    rows: int,
    sequence_length: int,
    micro_batches: int,
    strategy: ShardedStrategy,
    devices: int,
    kind: str,
) -> dict[str, StepMemory]:
    """Count the memory of a device for the run as it is (first), and with activation checkpointing the other way.

    Args:
        module: the stage, without a network.
        rows: of a micro-batch.
        sequence_length: positions in a row.
        micro_batches: of a device in a step.
        strategy: lays the network over the devices.
        devices: in all.
        kind: what the devices are, cpu or cuda.
    """
    other = copy.deepcopy(module)
    other.activation_checkpointing = not module.activation_checkpointing
    shape = {"rows": rows, "length": sequence_length, "micro_batches": micro_batches}
    measure = partial(measure_rows, **shape, kind=kind, results={})
    columns = {
        THIS_RUN: measure(module, strategy=strategy, devices=devices),
        f"checkpointing {'off' if module.activation_checkpointing else 'on'}": measure(
            other, strategy=strategy, devices=devices
        ),
    }
    if devices == 1:
        columns["without FSDP2"] = measure(module)
    return columns


def memory_lines(
    columns: Mapping[str, StepMemory],
    module: StageModule,
    rows: int,
    sequence_length: int,
    micro_batches: int,
    strategy: ShardedStrategy,
    devices: int,
    kind: str,
) -> list[str]:
    """Return the table of `measure_columns`, which takes the same arguments, and what is to be known beside it."""
    device = _DEVICES[kind][devices > 1]
    return [
        f"{devices:,} {device}, micro-batches of {rows} x {sequence_length:,} positions, {micro_batches:,} in a step; "
        f"activation checkpointing {'on' if module.activation_checkpointing else 'off'}",
        *_columns([*columns], [*columns.values()]),
        *(["weights that do not train lie in the dtype they are multiplied in"] if module.lora is not None else []),
        *_gradient_lines(strategy, micro_batches, devices),
        *_padding_lines(module, columns[THIS_RUN], devices),
        "",
        "counted: bytes of all tensors while a step runs without values, one document per row; mamba-ssm's",
        "SSD kernel needs less, an allocator's rounding and other processes' needs more",
    ]


def _gradient_lines(strategy: ShardedStrategy, micro_batches: int, devices: int) -> list[str]:
    """Say when gradients are summed, where that decides how long a device holds those of the whole network."""
    if micro_batches == 1 or devices == 1:
        return []
    if strategy.gradient_sync == "every":
        return ["gradients are summed over devices with every micro-batch: a device holds its part of them"]
    return [
        "gradients are summed over devices with the last micro-batch of a step: until then a device holds",
        "them whole; trainer.strategy.init_args.gradient_sync: every needs less memory and more time",
    ]


def _padding_lines(module: StageModule, measured: StepMemory, devices: int) -> list[str]:
    """Say so where much of what is sharded is padding: FSDP2 cuts along dimension 0, into equal parts."""
    trained = filter(lambda parameter: parameter.requires_grad, module.build_network().parameters())
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    share = 1 - parameters / (measured.gradients * devices)
    if share < _MUCH_PADDING:
        return []
    return [f"{share:.0%} of the shards is padding: more devices than rows (experts) in the largest tensors"]


def _columns(names: Sequence[str], columns: Sequence[StepMemory]) -> list[str]:
    size, unit = byte_unit(max(column.peak for column in columns))
    rows = [(unit, *names)]
    rows += [
        (label, *(f"{getattr(column, attribute) / size:,.3f}" for column in columns))
        for label, attribute in _ROWS.items()
    ]
    return align(rows)
