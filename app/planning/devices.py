"""The devices that a plan is for: GPUs of a kind, wherever they are, or what this machine has."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from callbacks.peak import Peak, measure_peak
from modules.errors import UserError
from modules.precision.devices import GPU, GPUS, find_gpu
from modules.precision.formats import Format

THIS = "this"
"""Stands for what this machine has."""
KINDS = {gpu.name.lower(): gpu for gpu in GPUS if gpu.memory_mib is not None}
"""GPUs that can be named, by their names in small letters."""
UNSEEN = KINDS["h100"]
"""What a run on GPUs is planned for where none is named and none is here."""
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux says how much memory a container may take."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One of the devices that a run is laid over."""

    name: str
    """For people, after a number."""
    kind: str
    """cpu or cuda."""
    memory: int
    """Bytes that it has in all."""
    gpu: GPU | None = None
    """Its figures; None: a CPU, or a GPU that is not in the table."""
    here: bool = False
    """Whether it is this machine's, which then decides what runs on it."""
    share: float = 1.0
    """Part of a CPU's cores that a process has for itself, where it shares them with others of the run."""

    @property
    def capability(self) -> tuple[int, int] | None:
        """Compute capability to judge formats by; None: this machine decides."""
        return None if self.here or self.gpu is None else self.gpu.capability

    def peak(self, number_format: Format) -> Peak:
        """Return what it can do at best in a format: by the data sheet, or measured (takes half a second).

        Raises:
            UserError: it is elsewhere, and no sheet has a figure.
        """
        if self.gpu is not None and number_format in self.gpu.peaks:
            return Peak(self.gpu.peaks[number_format] * 1e12, "data sheet")
        if not self.here:
            raise UserError(f"--device: no {number_format} figure of {self.name} is known; give --peak_tflops")
        measured = measure_peak(torch.device(self.kind), number_format)
        return Peak(measured.flops * self.share, "measured just now")


def choose_device(name: str | None, accelerator: str | None, given: Any, processes: int) -> tuple[Device, list[str]]:
    """Return the device to plan for, and a line where it is assumed.

    Args:
        name: kind of GPU in any case, or `this`; None: this machine's.
        accelerator: cpu or gpu, for this machine; None: as the run file says.
        given: trainer.accelerator of the run file.
        processes: of the run in a machine; those of a CPU share its memory and its cores.

    Raises:
        UserError: nobody knows the name, or it contradicts the rest.
    """
    asked = None if name is None else name.strip().lower().removeprefix("nvidia ")
    if asked not in (None, THIS):
        if asked not in KINDS:
            known = ", ".join([*(gpu.name for gpu in KINDS.values()), THIS])
            raise UserError(f"--device: {name!r} is not known; choose one of {known}")
        if accelerator == "cpu":
            raise UserError(f"--accelerator: cpu, but --device {name} is a GPU; leave one of the two out")
        return _elsewhere(KINDS[asked]), []
    on_gpu = (accelerator or given) in ("gpu", "cuda") or (accelerator is None and given == "auto")
    if on_gpu and torch.cuda.is_available():
        properties, whole = torch.cuda.get_device_properties(0), torch.cuda.get_device_name(0)
        gpu = find_gpu(whole)
        return Device(name=whole, kind="cuda", memory=properties.total_memory, gpu=gpu, here=True), []
    if not on_gpu or (accelerator is None and given == "auto"):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = min(1.0, cores / (torch.get_num_threads() * processes))
        memory = machine_memory() // processes
        name = f"CPU process{'es' * (processes > 1)} here"
        return Device(name=name, kind="cpu", memory=memory, here=True, share=share), []
    if asked == THIS:
        key = "--accelerator" if accelerator else "trainer.accelerator"
        raise UserError(
            f"--device: this machine has no CUDA device, and {key} asks for a GPU; name a kind (--device H100), or "
            "give --accelerator cpu"
        )
    return _elsewhere(UNSEEN), [f"{UNSEEN.name} assumed, as no GPU is here; name another with --device"]


def kinds() -> list[Device]:
    """Return the GPUs to choose from; not the variants of a kind."""
    return [_elsewhere(gpu) for gpu in KINDS.values() if " " not in gpu.name]


def machine_memory() -> int:
    """Return the bytes of memory that this machine has, or that its container may take."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in _LIMITS:
        text = file.read_text(encoding="ascii").strip() if file.exists() else ""
        found += [int(text)] if text.isdigit() else []
    return min(found)


def _elsewhere(gpu: GPU) -> Device:
    assert gpu.memory_mib is not None
    return Device(name=gpu.name, kind="cuda", memory=gpu.memory_mib * 2**20, gpu=gpu)
