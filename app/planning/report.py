"""All that `plan` says: the verdict, then the tables; as text, or as one JSON object."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

import torch

from app.cli import RunCLI
from app.planning.arithmetic import flop_lines
from app.planning.devices import Device, choose_device, kinds
from app.planning.memory import measure_rows
from app.planning.memory_table import THIS_RUN, measure_columns, memory_lines
from app.planning.parameters import Count, count_parts, parameter_lines
from app.planning.schedule import run_lines
from app.planning.speed import MeasuredSpeed, device_count, measured_speed
from app.planning.text import duration, wrap
from app.planning.verdict import (
    GIB,
    Speed,
    Verdict,
    Work,
    assume_speed,
    emulated_formats,
    fitting_devices,
    judge_memory,
    verdict_lines,
)
from app.strategies import ShardedStrategy
from modules.backbone.flops import decode_flops, matmul_flops, training_flops_per_token
from modules.backbone.model import Network
from modules.base import StageModule
from modules.errors import UserError
from modules.precision.table import precision_groups, precision_lines


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `plan`; None: not given.

    Raises:
        UserError: one is out of range, or contradicts another.
    """

    device: str | None = None
    """Kind of the devices."""
    devices: int | None = None
    """In all."""
    accelerator: Literal["cpu", "gpu"] | None = None
    """What to take of this machine."""
    tokens_per_second: float | None = None
    """Of one device."""
    mfu: float | None = None
    """Share of the peak."""
    peak_tflops: float | None = None
    """Of one device."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("devices", "tokens_per_second", "mfu", "peak_tflops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"--{name}: {value} must be positive")
        if self.mfu is not None and self.mfu > 1:
            raise UserError(f"--mfu: {self.mfu} is a share of the peak; give a number up to 1")
        for name in ("mfu", "peak_tflops"):
            if getattr(self, name) is not None and self.tokens_per_second is not None:
                raise UserError(f"--tokens_per_second says the speed, and so does --{name}; leave one of the two out")


class Report:
    """Works a plan out.

    Args:
        run: the parsed run.
        module: its stage, without a network.
        data: its datamodule.
        options: of `plan`.

    Raises:
        UserError: the run or an option is wrong.
    """

    def __init__(self, run: RunCLI, module: StageModule, data: Any, options: Options) -> None:
        self._run, self._module, self._data, self._options = run, module, data, options
        trainer = run.config.trainer
        per_machine = device_count(trainer)
        devices = options.devices or (per_machine or 1) * trainer.num_nodes
        self._device, self._notes = choose_device(
            options.device, options.accelerator, trainer.accelerator, -(-devices // trainer.num_nodes)
        )
        if options.devices is None and per_machine is None:
            if self._device.here and self._device.kind == "cuda":
                devices = torch.cuda.device_count() * trainer.num_nodes
            elif not self._device.here:
                where = "" if trainer.num_nodes == 1 else f" in each of {trainer.num_nodes} machines"
                self._notes.append(
                    f"1 device assumed{where} (trainer.devices: {trainer.devices}); give --devices for others"
                )
        self._devices, self._micro_batches = devices, self._divide(devices)
        self._strategy = _strategy(trainer.strategy)
        self._network = module.build_network(self._device.kind, self._device.capability)
        self._precision = module.precision_table
        flops = training_flops_per_token(module.backbone_config, data.sequence_length, module.mtp_depths)
        self._work = Work(tokens=data.total.tokens, flops_per_token=flops, mtp_depths=module.mtp_depths)
        self._length = run_lines(module, data)
        self._columns = measure_columns(module, *self._layout)
        speed = self._speed()
        self._verdict = self._judge(self._device, self._network, speed)
        self._others = self._compare()
        self._notes += self._mends()

    @property
    def _layout(self) -> tuple[int, int, int, ShardedStrategy, int, str]:
        data = self._data
        rows, length = data.micro_batch_size, data.sequence_length
        return rows, length, self._micro_batches, self._strategy, self._devices, self._device.kind

    def as_text(self) -> str:
        """Return the verdict and the tables."""
        module, network, depths = self._module, self._network, self._module.mtp_depths
        length, checkpointing = self._data.sequence_length, module.activation_checkpointing
        name = self._run.config.name
        sections = {
            "": verdict_lines(name, self._verdict, self._others, self._notes),
            f"Parameters of {name}": parameter_lines(network, depths),
            "Precision": precision_lines(self._precision, network, depths, by_module=True),
            "FLOPs per token": flop_lines(network.config, self._precision, length, depths, checkpointing),
            "Memory of a device": memory_lines(self._columns, module, *self._layout),
            "Run": self._length,
        }
        return "\n\n".join("\n".join([*filter(None, [title]), *wrap(lines)]) for title, lines in sections.items())

    def as_json(self) -> str:
        """Return all of it as one JSON object; sizes of the memory table in bytes."""
        module, config, length = self._module, self._network.config, self._data.sequence_length
        counts = count_parts(self._network)
        training = matmul_flops(config, length, module.mtp_depths)
        schedule, total = module.schedule, self._data.total
        return json.dumps(
            {
                "run": self._run.config.name,
                "verdict": self._verdict.as_dict(),
                "kinds": [verdict.as_dict() for verdict in self._others],
                "notes": self._notes,
                "parameters": {
                    "all": sum(counts.values(), Count()).parameters,
                    "parts": {part: dataclasses.asdict(count) for part, count in counts.items()},
                },
                "precision": [
                    {
                        "module": group.module,
                        "pattern": group.pattern,
                        "format": group.products.fprop,
                        "backend": group.backend,
                        "modules": len(shares),
                        "share": sum(shares),
                    }
                    for group, shares in precision_groups(self._precision, self._network, module.mtp_depths).items()
                ],
                "flops_per_token": {
                    "training": self._work.flops_per_token,
                    "training_parts": {part: count.total / length for part, count in training.items()},
                    "decoding_parts": decode_flops(config, length),
                },
                "memory": {
                    name: dataclasses.asdict(step) | {"peak": step.peak, "first_peak": step.first_peak}
                    for name, step in self._columns.items()
                },
                "length": {
                    "tokens": total.tokens,
                    "steps": total.steps,
                    "warmup_tokens": schedule.warmup_tokens,
                    "decay_tokens": schedule.decay_tokens,
                    "learning_rate": module.optimizer_config.learning_rate,
                },
            },
            indent=1,
        )

    def _divide(self, devices: int) -> int:
        """Return the micro-batches of a device in a step."""
        rows, micro_batch = self._data.global_batch_size, self._data.micro_batch_size
        if rows % (micro_batch * devices):
            key, counts = "--devices" if self._options.devices else "trainer.devices", self._possible()
            near = [*[n for n in counts if n < devices][-1:], *[n for n in counts if n > devices][:1]]
            mends = [f"take --devices {' or '.join(map(str, near))}"] if near else []
            if rows % devices == 0:
                smaller = max(size for size in range(1, micro_batch) if rows // devices % size == 0)
                mends.append(f"data.init_args.micro_batch_size {smaller}")
            mends.append(f"a multiple of {micro_batch * devices} rows")
            raise UserError(
                f"{key}: {rows} rows (data.init_args.global_batch_size) do not divide among {devices} devices with "
                f"data.init_args.micro_batch_size {micro_batch}; {', or '.join(mends)}"
            )
        return rows // (micro_batch * devices)

    def _possible(self) -> list[int]:
        """Return the numbers of devices that the batch divides among, rising."""
        rows, micro_batch = self._data.global_batch_size, self._data.micro_batch_size
        return [count for count in range(1, rows // micro_batch + 1) if rows % (micro_batch * count) == 0]

    def _judge(self, device: Device, network: Network, speed: Speed) -> Verdict:
        return Verdict(
            device=device,
            devices=self._devices,
            fit=judge_memory(self._columns[THIS_RUN], device),
            speed=speed,
            work=self._work,
            emulated=emulated_formats(network),
        )

    def _speed(self) -> Speed:
        """Return the speed that is stated, that the run has logged on this machine, or an assumed one."""
        options, devices = self._options, self._devices
        if options.tokens_per_second is not None:
            return Speed(tokens_per_second=options.tokens_per_second * devices, basis="stated", source="stated")
        if self._device.here and options.mfu is None and options.peak_tflops is None:
            measured = measured_speed(self._run.run_folder, self._run.config_text())
            if isinstance(measured, MeasuredSpeed):
                on = f"{measured.devices:,} device{'s' * (measured.devices > 1)}"
                source = f"measured on {on} in {self._run.run_folder.path}"
                source += ", taken times devices" if measured.devices != devices else ""
                speed = measured.tokens_per_second / measured.devices * devices
                return Speed(tokens_per_second=speed, basis="measured", source=source)
            self._notes.append(f"no speed is known: {measured}")
        return assume_speed(self._network, self._work, self._device, devices, options.mfu, options.peak_tflops)

    def _compare(self) -> list[Verdict]:
        """Return the verdict on each kind of GPU; none for a CPU, and where a speed is stated, which is that of one."""
        options, verdicts = self._options, []
        if self._device.kind == "cpu" or options.tokens_per_second is not None or options.peak_tflops is not None:
            return []
        for device in kinds():
            try:
                network = self._module.build_network(device.kind, device.capability)
            except UserError:  # the backend that the run file asks for does not run there
                continue
            speed = assume_speed(network, self._work, device, self._devices, options.mfu, None)
            verdicts.append(self._judge(device, network, speed))
        return verdicts

    def _mends(self) -> list[str]:
        """Return what would fit where this does not."""
        device, data, name = self._device, self._data, "model.init_args.activation_checkpointing"
        if self._verdict.fit.fits:
            return []
        mends = []
        if not self._module.activation_checkpointing:
            fit = judge_memory(self._columns["checkpointing on"], device)
            mends += [f"{name}: true fits: {fit.needed / GIB:,.1f} GiB of each device"] if fit.fits else []
        if device.kind == "cuda":
            found = fitting_devices(
                lambda count: measure_rows(
                    self._module,
                    data.micro_batch_size,
                    data.sequence_length,
                    data.global_batch_size // (data.micro_batch_size * count),
                    self._strategy,
                    count,
                    device.kind,
                ),
                self._columns[THIS_RUN],
                device,
                self._devices,
                self._possible(),
            )
            if found is not None:
                count, fit = found
                days = duration(self._verdict.seconds * self._devices / count)
                mends.append(f"--devices {count} fits: {fit.needed / GIB:,.1f} GiB of each {device.name}; {days}")
        if data.micro_batch_size > 1:
            mends.append("a smaller data.init_args.micro_batch_size needs less; the result stays the same")
        return mends


def _strategy(given: Any) -> ShardedStrategy:
    return ShardedStrategy() if isinstance(given, str) else ShardedStrategy(**given.init_args.as_dict())
