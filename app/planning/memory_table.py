"""The memory of a device as a table."""

import copy
from collections.abc import Sequence

from app.planning.memory import StepMemory, measure_step
from app.planning.text import align, byte_unit
from modules.base import StageModule

_ROWS = {
    "weights, fp32": "weights",
    "gradients": "gradients",
    "optimiser state": "optimizer",
    "micro-batch": "batch",
    "activations kept for the backward pass": "kept",
    "more at the peak": "passing",
    "peak of a step": "peak",
    "peak of the first step": "first_peak",
    "most held by the loss (logits in chunks)": "loss_peak",
    "most gathered by FSDP2 at a time": "gathered_peak",
}

_MUCH_PADDING = 0.05
_DEVICES = {"cuda": ("GPU", "GPUs"), "cpu": ("CPU process", "CPU processes")}
"""Kind -> a device, several devices."""


def memory_lines(
    module: StageModule, rows: int, sequence_length: int, accumulation: int, devices: int, kind: str
) -> list[str]:
    """Count the memory of a device for the run as it is, and with activation checkpointing the other way.

    Args:
        module: the stage, without a network.
        rows: of a micro-batch.
        sequence_length: positions in a row.
        accumulation: micro-batches in a step.
        devices: in all.
        kind: what the devices are, cpu or cuda.
    """
    documents = [[sequence_length]] * rows
    other = copy.deepcopy(module)
    other.activation_checkpointing = not module.activation_checkpointing
    columns = {
        "this run": measure_step(module, documents, accumulation > 1, devices, kind),
        f"checkpointing {'off' if module.activation_checkpointing else 'on'}": measure_step(
            other, documents, accumulation > 1, devices, kind
        ),
    }
    if devices == 1:
        columns["without FSDP2"] = measure_step(module, documents, accumulation > 1, None, kind)
    device = _DEVICES[kind][devices > 1]
    return [
        f"{devices:,} {device}, micro-batches of {rows} x {sequence_length:,} positions, {accumulation:,} in a step; "
        f"activation checkpointing {'on' if module.activation_checkpointing else 'off'}",
        *_columns([*columns], [*columns.values()]),
        *_padding_lines(module, columns["this run"], devices),
        "",
        "counted: bytes of all tensors while a step runs on the meta device, portable operations and one document per",
        "row; fast kernels (SSD, packed attention) need less, an allocator's rounding and other processes' needs more",
    ]


def _padding_lines(module: StageModule, measured: StepMemory, devices: int) -> list[str]:
    """Say so where much of what is sharded is padding: FSDP2 cuts along dimension 0, into equal parts."""
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in module.build_network().parameters())
    share = 1 - parameters / (measured.gradients * devices)
    if share < _MUCH_PADDING:
        return []
    return [f"{share:.0%} of the shards is padding: there are more devices than rows (experts) in the largest tensors"]


def _columns(names: Sequence[str], columns: Sequence[StepMemory]) -> list[str]:
    size, unit = byte_unit(max(column.peak for column in columns))
    rows = [(unit, *names)]
    rows += [
        (label, *(f"{getattr(column, attribute) / size:,.3f}" for column in columns))
        for label, attribute in _ROWS.items()
    ]
    return align(rows)
