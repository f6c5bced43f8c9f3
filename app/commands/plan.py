"""What a run file asks for, without a device: parameters, FLOPs, memory, tokens, schedule and time.

The file is parsed by fit's own parser, the network is built on the meta device and a step of it really runs there, so
the 120B model takes seconds on a laptop and a plan can never describe another model than the one `fit` would train.
"""

from typing import TYPE_CHECKING, Any, Literal

from modules.errors import UserError

if TYPE_CHECKING:
    from app.cli import RunCLI
    from app.strategies import ShardedStrategy


def plan(
    *arguments: str,
    devices: int | None = None,
    accelerator: Literal["cpu", "gpu"] | None = None,
    tokens_per_second: float | None = None,
    mfu: float | None = None,
    peak_tflops: float | None = None,
) -> None:
    """Print what a run asks for: parameters, FLOPs, memory, tokens, schedule, time; no device and no data needed.

    Args:
        arguments: Run files and keys as `fit` takes them, for example --config configs/pretrain.yaml --name=mine; of a
            key that is given several times the last one counts.
        devices: Devices in all; those of the run file (trainer.devices x num_nodes, auto counts as 1) unless given.
        accelerator: Kind of device, cpu or gpu; that of the run file (auto: what this machine has) unless given.
        tokens_per_second: Speed of one device for the expected time; what the run has logged unless given.
        mfu: Share of the peak that the matrix products of training reach, 0 to 1; with --peak_tflops, for the time.
        peak_tflops: Peak of one device in 10^12 FLOP/s, with --mfu.

    Raises:
        UserError: a file, key or option is wrong; the message names it and the mend.

    Example:
        python -m app plan --config configs/pretrain.yaml
    """
    from app.cli import parse_run
    from app.planning.arithmetic import flop_lines
    from app.planning.memory_table import memory_lines
    from app.planning.parameters import parameter_lines
    from app.planning.schedule import run_lines
    from modules.base import StageModule
    from modules.precision.table import precision_lines

    _check_options(devices, tokens_per_second, mfu, peak_tflops)
    run = parse_run(list(arguments))
    module, data = run.instantiate("model"), run.instantiate("data")
    if not isinstance(module, StageModule):
        raise UserError(f"model.class_path: {run.config.model.class_path} is none of the stages in modules/")
    count, assumed = (devices, []) if devices is not None else _devices(run.config.trainer)
    rows, length = data.micro_batch_size, data.sequence_length
    accumulation = _accumulation(data.global_batch_size, rows, count)
    kind = "cuda" if (accelerator or _accelerator(run.config.trainer.accelerator)) == "gpu" else "cpu"
    network, depths = module.build_network(kind), module.mtp_depths
    length_of_run = run_lines(module, data)
    checkpointing = module.activation_checkpointing
    sections = {
        f"Parameters of {run.config.name}": parameter_lines(network, depths),
        "Precision": precision_lines(module.precision_table, network, depths, by_module=True),
        "FLOPs per token": flop_lines(network.config, module.precision_table, length, depths, checkpointing),
        "Memory of a device": assumed
        + memory_lines(module, rows, length, accumulation, _strategy(run.config.trainer.strategy), count, kind),
        "Run": length_of_run,
        "Time": _time_lines(run, module, data, count, tokens_per_second, mfu, peak_tflops),
    }
    print("\n\n".join("\n".join([title, *lines]) for title, lines in sections.items()))


def _check_options(
    devices: int | None, tokens_per_second: float | None, mfu: float | None, peak_tflops: float | None
) -> None:
    given = {"devices": devices, "tokens_per_second": tokens_per_second, "mfu": mfu, "peak_tflops": peak_tflops}
    for name, value in given.items():
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name}: {value} must be positive")
    if mfu is not None and mfu > 1:
        raise UserError(f"--mfu: {mfu} is a share of the peak; give a number up to 1")
    if (mfu is None) != (peak_tflops is None):
        raise UserError("--mfu and --peak_tflops go together: their product is the speed of a device")
    if mfu is not None and tokens_per_second is not None:
        raise UserError("--tokens_per_second: the speed follows from --mfu and --peak_tflops already; leave one out")


def _devices(trainer: Any) -> tuple[int, list[str]]:
    """Return the devices in all that a run file asks for, and a line where they are assumed."""
    from app.planning.speed import device_count

    count, machines = device_count(trainer), trainer.num_nodes
    if count is not None:
        return count * machines, []
    where = "" if machines == 1 else f" in each of {machines} machines"
    return machines, [f"1 device assumed{where} (trainer.devices: {trainer.devices}); give --devices for others"]


def _accelerator(given: Any) -> str:
    import torch

    if given in ("gpu", "cuda"):
        return "gpu"
    return "gpu" if given == "auto" and torch.cuda.is_available() else "cpu"


def _strategy(given: Any) -> "ShardedStrategy":
    from app.strategies import ShardedStrategy

    return ShardedStrategy() if isinstance(given, str) else ShardedStrategy(**given.init_args.as_dict())


def _accumulation(rows: int, micro_batch: int, devices: int) -> int:
    if rows % (micro_batch * devices):
        from datamodules.pretraining import uneven_batch

        raise UserError(uneven_batch(rows, micro_batch, devices))
    return rows // (micro_batch * devices)


def _time_lines(
    run: "RunCLI",
    module: Any,
    data: Any,
    devices: int,
    tokens_per_second: float | None,
    mfu: float | None,
    peak_tflops: float | None,
) -> list[str]:
    from app.planning.schedule import time_lines
    from app.planning.speed import MeasuredSpeed, measured_speed
    from app.planning.text import with_prefix
    from modules.backbone.flops import training_flops_per_token

    flops = training_flops_per_token(module.backbone_config, data.sequence_length, module.mtp_depths)
    tokens = data.total.tokens
    if mfu is not None and peak_tflops is not None:
        speed = mfu * peak_tflops * 1e12 / flops * devices
        return time_lines(tokens, flops, speed, devices, f"{mfu:.3g} of {peak_tflops:g} TFLOP/s, stated")
    if tokens_per_second is not None:
        return time_lines(tokens, flops, tokens_per_second * devices, devices, "stated")
    measured = measured_speed(run.run_folder, run.config_text())
    if isinstance(measured, MeasuredSpeed):
        source = f"measured on {measured.devices:,} device{'s' * (measured.devices > 1)} in {run.run_folder.path}"
        if measured.devices != devices:
            source += ", taken times devices"
        speed = measured.tokens_per_second / measured.devices * devices
        return time_lines(tokens, flops, speed, devices, source)
    return [
        f"{with_prefix(tokens * flops, 'FLOP')} in all; no speed is known: {measured}",
        "give --tokens_per_second (of one device), or --mfu and --peak_tflops",
    ]
