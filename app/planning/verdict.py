"""The answer that a plan begins with: does the run fit, how long does it take, what does it cost.

Where no speed is known, a share of the peak is assumed, and said. A step takes 1 / share of the time that its matrix
products need at the peak, quantised ones counted as bf16: that is what MFU means. Hardware for few bits then shortens
the products and nothing else. For Nemotron 3 Super on GB200 this gives NVFP4 a gain of 11% over bf16; published are 9%
(559 and 610 TFLOP/s a GPU; Megatron Bridge).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from app.planning.devices import Device
from app.planning.memory import StepMemory
from app.planning.text import align, duration, with_prefix, wrap
from callbacks.peak import Peak, combine, format_shares
from modules.precision.backends import EMULATED
from modules.precision.formats import Format
from modules.precision.linear import FormattedModule
from modules.precision.recipe import quantized_schemes
from modules.precision.table import work_shares

GIB = 2**30
ASSUMED_SHARE = {"cuda": 0.2, "cpu": 0.5}
"""Share of the peak that is assumed where no speed is known. Published runs of Nemotron 3 Super reach 0.22 (GB200) to
0.25 (H100) of the bf16 peak; `configs/pretrain.yaml` reached 0.59 on a CPU core."""
SPREAD = 0.15
"""Share of the counted memory that an allocator's rounding and fragments are taken to add. A published run of Super on
H100 reserved 70 GiB for 59 GiB allocated (with the next figure: 70)."""
FIXED = {"cuda": 2 * GIB, "cpu": GIB // 2}
"""Bytes that a process holds beside its tensors: CUDA's context and NCCL's buffers, or Python and torch."""
MACHINE = 8
"""GPUs of a machine: more than that are advised in whole machines."""

Basis = Literal["stated", "measured", "assumed"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run computes."""

    tokens: int
    """Positions, padding included."""
    flops_per_token: float
    """Of training."""
    mtp_depths: int
    """M."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Memory of a device against what the run needs of it, in bytes."""

    counted: int
    """Peak of the tensors."""
    allowance: int
    """For what is not counted."""
    memory: int
    """What the device has."""

    @property
    def needed(self) -> int:
        """What the run needs."""
        return self.counted + self.allowance

    @property
    def spare(self) -> int:
        """What is left; negative: what is missing."""
        return self.memory - self.needed

    @property
    def fits(self) -> bool:
        """Whether the run fits."""
        return self.spare >= 0


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a run is, and who says so."""

    tokens_per_second: float
    """Of all devices."""
    basis: Basis
    source: str
    """In words."""


def judge_memory(step: StepMemory, device: Device) -> Fit:
    """Return whether a step fits a device."""
    counted = max(step.peak, step.first_peak)
    return Fit(counted=counted, allowance=round(SPREAD * counted) + FIXED[device.kind], memory=device.memory)


def assume_speed(
    network: nn.Module, work: Work, device: Device, devices: int, share: float | None, peak_tflops: float | None
) -> Speed:
    """Return the speed that a share of the peak gives.

    Args:
        network: with its formats judged for the device.
        work: of the run.
        device: one of the devices.
        devices: in all.
        share: MFU as `fit` tells it, stated; None: it is assumed, and faster hardware for few bits counts.
        peak_tflops: stated peak of a device in 1e12 FLOP/s; None: that of its data sheet, or measured.

    Raises:
        UserError: no peak is known.
    """
    told = format_shares(network, work.mtp_depths)
    peaks: dict[Format, Peak] = {}
    if peak_tflops is None:
        peaks |= {number_format: device.peak(number_format) for number_format in told}
        peak, source = combine(told, peaks), next(iter(peaks.values())).source
    else:
        peak, source = peak_tflops * 1e12, "stated"
    bound = f"{peak / 1e12:.4g} TFLOP/s, {source}"
    if share is not None:
        speed = share * peak / work.flops_per_token * devices
        return Speed(tokens_per_second=speed, basis="stated", source=f"{share:.3g} of {bound}")
    saved, text = 0.0, f"assumed: {ASSUMED_SHARE[device.kind]:.3g} of {bound}"
    fast = hardware_shares(network, work.mtp_depths)
    if peaks and fast != told:
        peaks |= {number_format: device.peak(number_format) for number_format in fast if number_format not in peaks}
        saved = 1 - peak / combine(fast, peaks)
        text += "; products in few bits save some of the time"
    speed = peak / (1 / ASSUMED_SHARE[device.kind] - saved) / work.flops_per_token * devices
    return Speed(tokens_per_second=speed, basis="assumed", source=text)


def hardware_shares(network: nn.Module, mtp_depths: int) -> dict[Format, float]:
    """Return the share of each format in the FLOPs of `format_shares`, as the hardware multiplies: emulated is bf16."""
    shares: dict[Format, float] = {}
    emulated = {name for name, scheme in quantized_schemes(network).items() if scheme.backend.name == EMULATED.name}
    for name, share in work_shares(network, mtp_depths).items():
        module = network.get_submodule(name)
        assert isinstance(module, FormattedModule)
        chosen: Format = "bf16" if name in emulated else module.format
        shares[chosen] = shares.get(chosen, 0.0) + share
    return {number_format: part for number_format, part in shares.items() if part}


def emulated_formats(network: nn.Module) -> list[str]:
    """Return the formats of a network that the device has no products for."""
    schemes = quantized_schemes(network).values()
    return [*dict.fromkeys(s.planned.fprop for s in schemes if s.backend.name == EMULATED.name)]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a run asks of devices of a kind."""

    device: Device
    """One of them."""
    devices: int
    """In all."""
    fit: Fit
    """Memory of each."""
    speed: Speed
    """Of all."""
    work: Work
    """Of the run."""
    emulated: list[str]
    """Formats that it has no products for."""

    @property
    def seconds(self) -> float:
        """Of training, without validation and checkpoints."""
        return self.work.tokens / self.speed.tokens_per_second

    @property
    def device_hours(self) -> float:
        """What that costs."""
        return self.seconds * self.devices / 3600

    @property
    def flops(self) -> float:
        """FLOP/s of the model that each device does."""
        return self.speed.tokens_per_second * self.work.flops_per_token / self.devices

    def as_dict(self) -> dict[str, Any]:
        """Return it in plain values, for --json."""
        return {
            "device": self.device.name,
            "devices": self.devices,
            "fits": self.fit.fits,
            "device_gib": self.fit.memory / GIB,
            "needed_gib": self.fit.needed / GIB,
            "counted_gib": self.fit.counted / GIB,
            "allowance_gib": self.fit.allowance / GIB,
            "spare_gib": self.fit.spare / GIB,
            "seconds": self.seconds,
            "device_hours": self.device_hours,
            "tokens_per_second": self.speed.tokens_per_second,
            "tflops_per_device": self.flops / 1e12,
            "speed_basis": self.speed.basis,
            "speed_source": self.speed.source,
            "emulated": self.emulated,
        }


def verdict_lines(name: str, verdict: Verdict, others: Sequence[Verdict], notes: Sequence[str]) -> list[str]:
    """Return the verdict in lines of at most `WIDTH` columns.

    Args:
        name: of the run.
        verdict: on the devices that are planned for.
        others: on as many devices of each kind; none for a CPU.
        notes: what is assumed, and what would fit.
    """
    fit, speed, work, device = verdict.fit, verdict.speed, verdict.work, verdict.device
    each = " on each" if verdict.devices > 1 else ""
    hours = f"{_hours(verdict.device_hours)} device hours"
    if fit.fits:
        answer = f"fits, {_gib(fit.spare)} to spare{each}; {duration(verdict.seconds)}; {hours}"
    else:
        answer = f"DOES NOT FIT, {_gib(-fit.spare)} too much{each}"
    times = "x " if device.kind == "cuda" else ""
    told = "--mfu (as fit prints it), or " if device.kind == "cuda" else ""
    mend = f"; state yours: {told}--tokens_per_second (of a device)"
    rows = [
        (
            "memory",
            f"needs {_gib(fit.needed)}, has {fit.memory / GIB:,.1f}: {fit.counted / GIB:,.1f} counted, "
            f"{fit.allowance / GIB:,.1f} added (allocator {SPREAD:.0%}, process {_gib(FIXED[device.kind])})",
        ),
        (
            "time",
            f"{duration(verdict.seconds)} for {with_prefix(work.tokens, '').strip()} tokens "
            f"({with_prefix(work.tokens * work.flops_per_token, 'FLOP')}), validation and checkpoints left out",
        ),
        ("cost", hours),
        (
            "speed",
            f"at {speed.tokens_per_second:,.0f} tokens/s, {with_prefix(verdict.flops, 'FLOP/s')} per device "
            f"({speed.source}){mend if speed.basis == 'assumed' else ''}",
        ),
    ]
    if verdict.emulated:
        rows.append(
            (
                "formats",
                f"{' and '.join(verdict.emulated)} emulated (see Precision): slower than bf16, which is not counted",
            )
        )
    rows += [("note", note) for note in notes]
    lines = wrap([f"{name} on {verdict.devices:,} {times}{device.name}: {answer}"])
    lines += wrap([f"  {title:<9}{text}" for title, text in rows], indent=" " * 11)
    return [*lines, *(["", *_table(others)] if others else [])]


def _table(verdicts: Sequence[Verdict]) -> list[str]:
    rows = [(f"{verdicts[0].devices:,} of", "GiB", "fits", "GiB to spare", "time", "device hours", "emulated")]
    rows += [
        (
            verdict.device.name,
            f"{verdict.fit.memory / GIB:,.1f}",
            "yes" if verdict.fit.fits else "no",
            f"{verdict.fit.spare / GIB:,.1f}",
            duration(verdict.seconds),
            _hours(verdict.device_hours),
            ", ".join(verdict.emulated) or "none",
        )
        for verdict in verdicts
    ]
    return align(rows, text_columns=(0, 6))


def fitting_devices(
    measure: Callable[[int], StepMemory], step: StepMemory, device: Device, devices: int, possible: Sequence[int]
) -> tuple[int, Fit] | None:
    """Return a number of devices that a run fits on, the least by what is spread over them; None: none was found.

    Args:
        measure: returns the memory of a step on a number of devices.
        step: that on `devices`, which does not fit.
        device: one of them.
        devices: in all.
        possible: numbers of devices that the batch divides among, rising.
    """
    total, room = (1 + SPREAD) * (step.weights + step.gradients + step.optimizer) * devices, device.memory
    for _ in range(3):  # what is not spread is known only where something was measured
        counts = (count for count in possible if count > devices and total <= room * count)
        found = next((count for count in counts if count < MACHINE or count % MACHINE == 0), None)
        if found is None:
            return None
        devices, fit = found, judge_memory(measure(found), device)
        if fit.fits:
            return found, fit
        room = device.memory - (fit.needed - total / found)
    return None


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"
