"""What FSDP2 holds beside the shards: gathered weights, their gradients, and buffers, unit by unit through a step.

It plays `fully_shard` as `app/strategies/sharded.py` uses it, on a meta network: each sharding unit is gathered before
its first module runs and freed after its last, in the forward and in the backward pass, where the unit that comes next
is gathered ahead; its gradients are reduced to shards at the end of its backward pass. The order in which buffers live
is that of torch/distributed/fsdp/_fully_shard; a test holds it against FSDP2 itself.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._pytree import tree_leaves

from app.planning.live import LiveBytes
from modules.backbone.model import Network, ShardingUnit


@dataclass(eq=False)
class _Unit:
    """A sharding unit and what it holds at the moment."""

    modules: list[nn.Module]
    gathered_bytes: int
    """Whole weights in the dtype they are gathered in."""
    reduced_bytes: int
    """Whole gradients in fp32."""
    weights: Tensor | None = None
    ahead: Tensor | None = None
    """Buffer of a gathering that is not yet copied to `weights`."""
    in_backward: bool = False
    waiting: set[nn.Module] = field(default_factory=set)
    """Modules that have yet to run in this forward pass."""
    places: list[int] = field(default_factory=list)
    """Where the unit stands in the order in which units ended their forward passes."""
    parameters: list[nn.Parameter] = field(default_factory=list)


class Sharding:
    """Lays a meta network over devices; its parameters become those that the modules see: whole, in the dtype gathered.

    Args:
        network: on the meta device.
        devices: N; 1 is FSDP2 on one process, which gathers by copying.
        live: counts the gathered weights and buffers.
        accumulates: whether there are gradients that new ones are added to.
    """

    def __init__(self, network: Network, devices: int, live: LiveBytes, accumulates: bool) -> None:
        self._devices, self._live, self._accumulates = devices, live, accumulates
        self.buffers = LiveBytes()
        """Gathered weights and buffers alone."""
        self._units: list[_Unit] = []
        self._order: list[_Unit] = []
        self._root: _Unit | None = None
        self._previous: Tensor | None = None
        self._reducing: Tensor | None = None
        self.gradients: list[Tensor] = []
        """Gradient shards of the step."""
        for buffer in network.buffers():
            live.ignore(buffer)
        taken: set[nn.Parameter] = set()
        for unit in network.sharding_units():
            self._add(unit, taken)

    def _add(self, given: ShardingUnit, taken: set[nn.Parameter]) -> None:
        unit = _Unit(given.modules, 0, 0)
        for module in {inner: None for outer in given.modules for inner in outer.modules()}:
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter in taken:
                    continue
                if given.dtype != parameter.dtype:
                    parameter = nn.Parameter(torch.empty_like(parameter, dtype=given.dtype))
                    setattr(module, name, parameter)
                taken.add(parameter)
                self._live.ignore(parameter)
                unit.parameters.append(parameter)
                elements = shard_rows(parameter, self._devices) * self._devices * parameter[0].numel()
                unit.gathered_bytes += elements * parameter.element_size()
                unit.reduced_bytes += elements * 4
        self._units.append(unit)
        for module in unit.modules:
            module.register_forward_pre_hook(partial(self._before_forward, unit))
            module.register_forward_hook(partial(self._after_forward, unit))

    def _before_forward(self, unit: _Unit, _: nn.Module, args: tuple) -> tuple | None:
        if unit.in_backward:  # recomputation
            if unit.weights is None:
                self._gather(unit)
            return None
        if unit.waiting:
            return None
        unit.waiting.update(unit.modules)
        self._root = self._root or unit
        if self._devices > 1:
            unit.ahead = self._allocate(unit.gathered_bytes)
            self._previous = None
        unit.weights = self._allocate(unit.gathered_bytes)
        self._previous, unit.ahead = unit.ahead, None
        return tuple(
            _AfterBackward.apply(value, self, unit) if isinstance(value, Tensor) and value.requires_grad else value
            for value in args
        )

    def _after_forward(self, unit: _Unit, module: nn.Module, _: Any, output: Any) -> None:
        unit.waiting.discard(module)
        if unit.in_backward or unit.waiting:
            return
        self._end_forward(unit, output)
        if unit is self._root:  # ends the passes of units of which only some modules have run (a tied embedding)
            for other in self._units:
                if other.waiting:
                    other.waiting.clear()
                    self._end_forward(other, output)
            self._root = self._previous = None

    def _end_forward(self, unit: _Unit, output: Any) -> None:
        unit.weights = None
        unit.places.append(len(self._order))
        self._order.append(unit)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: self._before_backward(unit))

    def _before_backward(self, unit: _Unit) -> None:
        if unit.in_backward:
            return
        unit.in_backward = True
        self._gather(unit)
        place = unit.places.pop()
        coming = self._order[place - 1]
        if place and self._devices > 1 and coming.weights is None and coming.ahead is None:
            coming.ahead = self._allocate(coming.gathered_bytes)

    def _gather(self, unit: _Unit) -> None:
        if unit.weights is None:
            if self._devices > 1 and unit.ahead is None:
                unit.ahead = self._allocate(unit.gathered_bytes)
            unit.weights = self._allocate(unit.gathered_bytes)
            unit.ahead = None

    def after_backward(self, unit: _Unit) -> None:
        """Free a unit's weights and reduce its gradients."""
        unit.in_backward, unit.weights, self._reducing = False, None, None
        if all(parameter.grad is None for parameter in unit.parameters):  # of a block at several depths: at the last
            return
        self._reducing = self._allocate(unit.reduced_bytes)
        for parameter in unit.parameters:
            parameter.grad = None
        shards = _buffer(unit.reduced_bytes // self._devices)
        self._live.observe(shards)
        if not self._accumulates:
            self.gradients.append(shards)
        if self._devices == 1:
            self._allocate(unit.reduced_bytes)  # the quotient by the divide factor

    def finish_backward(self) -> None:
        """Reduce what is left: units whose inputs have no gradient."""
        for unit in self._units:
            self.after_backward(unit)
        self._order.clear()
        self._reducing = None

    def _allocate(self, size: int) -> Tensor:
        buffer = _buffer(size)
        self._live.observe(buffer)
        self.buffers.observe(buffer)
        return buffer


def _buffer(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="meta")


class _AfterBackward(Function):
    """Identity; its backward pass runs when everything behind it has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sharding: Sharding, unit: _Unit) -> Tensor:
        ctx.sharding, ctx.unit = sharding, unit
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.sharding.after_backward(ctx.unit)
        return grad, None, None


def shard_rows(parameter: Tensor, devices: int) -> int:
    """Return the rows (of dimension 0) that a device holds, padding included."""
    return -(-parameter.shape[0] // devices)


def replace_by_shards(network: nn.Module, devices: int) -> None:
    """Make every parameter of a meta network as large as the first device's shard, tied ones once."""
    shards: dict[nn.Parameter, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            shape = (shard_rows(parameter, devices), *parameter.shape[1:])
            setattr(module, name, shards.setdefault(parameter, nn.Parameter(parameter.new_empty(shape))))
