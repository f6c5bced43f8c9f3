"""What a run tells of itself: one path from whoever records a value to the console and to TensorBoard."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["sum", "mean", "max"]
"""How the values of all micro-batches and ranks of a step become one."""


class Metrics(dict[str, Tensor | float]):
    """The newest value of each metric by TensorBoard name, and what of it is not yet written."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: dict[Reduction, dict[str, Tensor]] = {"sum": {}, "mean": {}, "max": {}}
        self._unwritten: dict[str, Tensor | float] = {}

    def record(self, name: str, value: Tensor | float, reduce: Reduction | None = None) -> None:
        """Record a value.

        Args:
            name: TensorBoard name.
            value: scalar; a detached tensor may stay on its device.
            reduce: how it joins those of the step's other micro-batches and ranks, of which each rank must record it,
                in the same order; it has no value before `end_step`. None: it is the same on all ranks already, and is
                written next.
        """
        if reduce is None:
            self[name] = self._unwritten[name] = value
            return
        part = torch.as_tensor(value, dtype=torch.float32)
        if reduce == "mean":
            part = torch.stack([part, torch.ones_like(part)])
        parts = self._parts[reduce]
        if name not in parts:
            parts[name] = part
        else:
            parts[name] = torch.maximum(parts[name], part) if reduce == "max" else parts[name] + part

    def record_all(self, values: Mapping[str, Tensor | float]) -> None:
        """Record values that need no reduction."""
        for name, value in values.items():
            self.record(name, value)

    def end_step(self, all_reduce: Callable[[Tensor, str], Tensor], device: torch.device) -> dict[str, Tensor]:
        """Reduce what was recorded in a step, and return it.

        Args:
            all_reduce: returns a tensor summed ("sum") or its maximum taken ("max") over ranks.
            device: where it reduces; numbers of the host go there.
        """
        step: dict[str, Tensor] = {}
        for reduce, parts in self._parts.items():
            if parts:
                stacked = torch.stack([part.to(device) for part in parts.values()])
                reduced = all_reduce(stacked, "max" if reduce == "max" else "sum")
                values = reduced[:, 0] / reduced[:, 1] if reduce == "mean" else reduced
                step |= dict(zip(parts, values, strict=True))
                parts.clear()
        self.update(step)
        return step

    def take_unwritten(self) -> dict[str, float]:
        """Return what was recorded since the last call, read from the device at once."""
        unwritten, self._unwritten = self._unwritten, {}
        tensors = {name: value.float() for name, value in unwritten.items() if isinstance(value, Tensor)}
        if tensors:
            device = next(iter(tensors.values())).device
            read = torch.stack([tensor.to(device) for tensor in tensors.values()]).tolist()
            unwritten |= dict(zip(tensors, read, strict=True))
        return {name: float(value) for name, value in unwritten.items()}
