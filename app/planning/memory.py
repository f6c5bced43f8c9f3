"""The memory of a training step: live tensor storages, counted while the step runs on tensors without values.

Nothing here knows the network: forward pass, chunked loss, backward pass, FSDP2 and optimiser really run, so the count
stays right when they change. What is counted are the bytes of tensors; an allocator adds to them (CUDA's rounds up and
fragments), and a process has more than tensors.

A layer runs once for all of its kind that have two neighbours of the same sizes on each side (FSDP2 works ahead);
what the step holds is then put together from how much each stretch of it added and held at most.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from app.planning.live import LiveBytes
from app.strategies import ShardedStrategy
from modules.backbone.initialization import local_part
from modules.backbone.layer import Layer
from modules.backbone.model import Network, Output
from modules.backbone.router import Routing
from modules.base import StageModule
from modules.batch import PackedBatch
from modules.ops.documents import document_boundaries
from modules.ops.kernels import computing_on
from modules.optim.clipping import clip_gradients
from modules.precision.formats import COMPUTE_DTYPE
from modules.precision.linear import FormattedModule
from modules.precision.lora import adapters

LONGEST_RUN = 65_536
"""Positions of the longest row that a step is run on."""


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes that a device holds; a step is an optimiser step."""

    weights: int
    """Parameters and buffers."""
    gradients: int
    """Gradients of what trains, summed over devices."""
    optimizer: int
    """State of the optimiser."""
    batch: int
    """The window: all micro-batches of the step."""
    kept: int
    """What the forward pass keeps for the backward pass."""
    forward_peak: int
    """Most that the forward pass and loss hold at once, beside weights, optimiser and batch; gradients included."""
    backward_peak: int
    """Most that the backward pass holds at once, likewise."""
    update_peak: int
    """Most that clipping and the optimiser hold at once beside weights, gradients, optimiser and batch."""
    loss_peak: int
    """Most that the head and the loss hold at once: logits of a chunk, gradients of the head and its inputs."""
    gathered_peak: int
    """Most whole weights that FSDP2 holds at once."""

    @property
    def peak(self) -> int:
        """Most that any step but the first holds."""
        most = max(self.forward_peak, self.backward_peak, self.gradients + self.update_peak)
        return self.weights + self.optimizer + self.batch + most

    @property
    def passing(self) -> int:
        """What a step holds at its peak beside weights, gradients, optimiser, batch and kept activations."""
        return self.peak - (self.weights + self.gradients + self.optimizer + self.batch + self.kept)

    @property
    def first_peak(self) -> int:
        """Most that the first step holds at once: the optimiser's state is made at its end."""
        update = self.gradients + self.optimizer + self.update_peak
        return self.weights + self.batch + max(self.forward_peak, self.backward_peak, update)


class Stretch(NamedTuple):
    """A part of a pass, such as that through a layer."""

    change: int
    """Bytes more at its end than at its start."""
    peak: int
    """Most bytes more than at its start."""


def measure_step(
    module: StageModule,
    documents: list[list[int]],
    micro_batches: int = 1,
    strategy: ShardedStrategy | None = None,
    devices: int = 1,
    kind: str = "cpu",
    whole: bool = False,
    results: dict[object, tuple] | None = None,
) -> StepMemory:
    """Run a training step without values and count its memory.

    Args:
        module: the stage, without a network.
        documents: lengths of the documents of each row of a micro-batch; rows have equal lengths.
        micro_batches: of a device in a step.
        strategy: lays the network over devices, as in `fit`; None: a plain network on one device. No process group may
            exist yet.
        devices: in all.
        kind: what the devices are, cpu or cuda.
        whole: run every layer, whether or not it has been met before.
        results: see `LiveBytes`; of other steps of the same shapes.

    Returns:
        What the first of the devices holds.
    """
    return _trace(module, documents, micro_batches, strategy, devices, kind, whole, results).memory()


def _trace(
    module: StageModule,
    documents: list[list[int]],
    micro_batches: int,
    strategy: ShardedStrategy | None,
    devices: int,
    kind: str,
    whole: bool = False,
    results: dict[object, tuple] | None = None,
) -> "_Trace":
    """Run the step of `measure_step`."""
    module = copy.deepcopy(module)
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in documents]).int()
    boundaries = document_boundaries(ids)
    network = module.build_network().train()
    layers = [cast(Layer, layer) for layer in network.backbone.layers]
    left, repeats = ([*range(len(layers))],) * 2 if whole else shorten(layers)
    network.backbone.layers = nn.ModuleList(layers[place] for place in left)
    with ExitStack() as stack:
        if strategy is not None:
            stack.enter_context(_ranks_without_values(devices))
            strategy.make_mesh("cpu")
            strategy.shard(network)
        stack.enter_context(computing_on(kind))
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        live = stack.enter_context(LiveBytes(mode, {} if results is None else results))
        network.to_empty(device="cpu")
        network.tie_weights()
        tokens = torch.empty(ids.shape, dtype=torch.int64)
        batch = PackedBatch(
            tokens=tokens,
            labels=torch.empty_like(tokens),
            document_ids=torch.empty(ids.shape, dtype=torch.int32),
            boundaries=boundaries,
        )
        return _measure(module, network, repeats, module.add_fields(batch), micro_batches, strategy, live)


def measure_rows(
    module: StageModule,
    rows: int,
    length: int,
    micro_batches: int = 1,
    strategy: ShardedStrategy | None = None,
    devices: int = 1,
    kind: str = "cpu",
    results: dict[int, dict] | None = None,
) -> StepMemory:
    """Count the memory of a step on rows of one document, see `measure_step`; long rows are not run.

    What each stretch of a step adds, and holds at most, grows by as much with each position once there are many chunks
    of head and scan: those of a long row follow from two shorter ones.

    Args:
        module: as there.
        rows: of a micro-batch.
        length: positions in a row.
        micro_batches: as there.
        strategy: as there.
        devices: as there.
        kind: as there.
        results: those of `measure_step` for each length.
    """
    results = {} if results is None else results

    def traced(length: int) -> _Trace:
        known = results.setdefault(length, {})
        return _trace(module, [[length]] * rows, micro_batches, strategy, devices, kind, results=known)

    if length <= LONGEST_RUN:
        return traced(length).memory()
    return traced(LONGEST_RUN // 2).grown(traced(LONGEST_RUN), length / (LONGEST_RUN // 2) - 1).memory()


@contextmanager
def _ranks_without_values(devices: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=devices, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _measure(
    module: StageModule,
    network: Network,
    repeats: Sequence[int],
    batch: PackedBatch,
    micro_batches: int,
    strategy: ShardedStrategy | None,
    live: LiveBytes,
) -> "_Trace":
    """Run a step of `network` as if its layers were those with the numbers `repeats`."""
    units = [unit for unit in network.modules() if isinstance(unit, FSDPModule)]
    for unit in units:
        unit.unshard()
    live.watch(network.parameters() if units else ())
    for unit in units:
        unit.reshard()
    parameters = [*map(local_part, _repeated(network, repeats, nn.Module.parameters))]
    trained = [parameter for parameter in _repeated(network, repeats, nn.Module.parameters) if parameter.requires_grad]
    update = _measure_update(module, [*map(local_part, trained)], live)
    summed_each = micro_batches > 1 and (strategy is None or strategy.gradient_sync == "every")
    if summed_each:
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
    passes = _Passes(network, repeats, batch.tokens.shape, live)
    module.network = network
    totals = {name: value.float() for name, value in module.count(batch).items()}
    stretches: list[list[Stretch]] = []
    runs = 1 if summed_each else min(micro_batches, 3)  # without gradients, adding to them, summing them over devices
    for number in range(1, runs + 1):
        if strategy is not None:
            strategy.sync_gradients(network, number == runs)
        passes.begin()
        loss = module.micro_batch_loss(batch, totals).loss
        forward = passes.end()
        loss.backward()
        del loss
        backward = passes.end()
        layers = len(network.backbone.layers)
        backward += [Stretch(0, 0)] * (layers + 1 - len(backward))
        stretches.append([*(forward[place] for place in repeats), *forward[layers:]])
        stretches.append([backward[0], *(backward[layers - place] for place in reversed(repeats))])
    sizes = {
        "weights": _bytes(parameters) + _bytes(_repeated(network, repeats, nn.Module.buffers)),
        "batch": _bytes(batch.tensors().values()) * micro_batches,
        "loss_peak": passes.loss_peak,
        "gathered_peak": live.watched_peak,
        **update,
    }
    return _Trace(stretches, sizes, update["gradients"] if summed_each else 0)


class _Trace(NamedTuple):
    """What was counted in a step."""

    stretches: list[list[Stretch]]
    """Of the forward and the backward pass in turn."""
    sizes: dict[str, int]
    """What else `StepMemory` tells."""
    before: int
    """Bytes of the gradients that there are before the first pass."""

    def grown(self, longer: "_Trace", times: float) -> "_Trace":
        """Return the trace of rows that are longer than these by `times` what those of `longer` are."""

        def grow(least: int, most: int) -> int:
            return round(least + times * (most - least))

        def grow_stretch(least: Stretch, most: Stretch) -> Stretch:
            return Stretch(grow(least.change, most.change), grow(least.peak, most.peak))

        stretches = [[*map(grow_stretch, *both)] for both in zip(self.stretches, longer.stretches, strict=True)]
        sizes = {name: grow(size, longer.sizes[name]) for name, size in self.sizes.items()}
        return _Trace(stretches, sizes, self.before)

    def memory(self) -> StepMemory:
        """Return what a step holds at most."""
        level, kept, forward_peak, backward_peak = self.before, 0, 0, 0
        for forward, backward in zip(self.stretches[::2], self.stretches[1::2], strict=True):
            kept, most = _add_up(forward)
            forward_peak, level = max(forward_peak, level + most), level + kept
            change, most = _add_up(backward)
            backward_peak, level = max(backward_peak, level + most), level + change
        return StepMemory(kept=kept, forward_peak=forward_peak, backward_peak=backward_peak, **self.sizes)


class _Passes:
    """Cuts passes through a network into stretches: one for each layer, up to its result or the gradient of that."""

    def __init__(self, network: Network, repeats: Sequence[int], shape: torch.Size, live: LiveBytes) -> None:
        self._live = live
        routed = [layer.letter == "E" for layer in network.backbone.layers]
        self._routers = sum(routed)
        missing = sum(routed[place] for place in repeats) - self._routers
        size = *shape, network.config.n_routed_experts
        self._scores = [torch.empty(size, requires_grad=True) for _ in range(missing)]
        self._routings: list[Routing] = []
        network.register_forward_hook(self._add_routings)
        self._start = 0
        self._stretches: list[Stretch] = []
        self.loss_peak = 0
        """Most that the head and what it calls have added."""
        for layer in network.backbone.layers:
            layer.register_forward_hook(self._leave_layer)
        network.lm_head.register_forward_pre_hook(self._cut)
        network.lm_head.register_forward_hook(self._leave_head)

    def begin(self) -> None:
        """Start a forward pass."""
        self._routings = []
        for scores in self._scores:
            scores.grad = None
            counts = scores.new_empty((len(scores), scores.shape[-1]), dtype=torch.int64)
            self._routings.append(Routing(scores.clone(), counts))
        self._live.restart()
        self._start, self._stretches = self._live.now, []

    def end(self) -> list[Stretch]:
        """End a pass, start the next and return the stretches."""
        self._cut()
        stretches, self._stretches = self._stretches, []
        return stretches

    def _cut(self, *_: object) -> None:
        now = self._live.now
        self._stretches.append(Stretch(now - self._start, self._live.peak - self._start))
        self._start = now
        self._live.restart()

    def _add_routings(self, _: nn.Module, args: object, output: Output) -> Output:
        """Show the loss the routings of all layers; it frees them, and holds what comes of them."""
        added, self._routings = self._routings, []
        return output._replace(router=[*output.router[: self._routers], *added, *output.router[self._routers :]])

    def _leave_layer(self, _: nn.Module, args: object, output: tuple[Tensor, object]) -> None:
        self._cut()
        if output[0].requires_grad:  # not before the first adapter
            output[0].register_hook(self._cut)

    def _leave_head(self, *_: object) -> None:
        self._cut()
        self.loss_peak = max(self.loss_peak, self._stretches[-1].peak)


def _add_up(stretches: Iterable[Stretch]) -> tuple[int, int]:
    """Return (the change over all stretches, the most that there is more than at their start)."""
    level = peak = 0
    for stretch in stretches:
        peak = max(peak, level + stretch.peak)
        level += stretch.change
    return level, peak


def _measure_update(module: StageModule, parameters: Sequence[Tensor], live: LiveBytes) -> dict[str, int]:
    """Clip gradients and take a step of the optimiser on tensors like `parameters`, which train."""
    stored = nn.ParameterList(torch.empty_like(parameter) for parameter in parameters)
    module.network = cast(Network, stored)
    optimizer: Any = module.configure_optimizers()
    optimizer.found_inf = torch.zeros(())
    for parameter in stored.parameters():
        parameter.grad = torch.empty_like(parameter)
    held = live.now
    live.restart()
    clip_gradients(stored.parameters(), module.optimizer_config.gradient_clip_norm)
    clip_peak = live.peak - held
    live.restart()
    optimizer.step()
    state = _bytes(value for state in optimizer.state.values() for value in state.values())
    return {
        "gradients": _bytes(parameters),
        "optimizer": state,
        "update_peak": max(clip_peak, live.peak - held - state),
    }


def shorten(layers: Sequence[Layer]) -> tuple[list[int], list[int]]:
    """Return (numbers of the layers of a shorter network, which of those stands for each layer).

    Loops are cut out of the sequence of layers as long as each kind of layer that has certain neighbours is left.
    """
    formats = [[part.format for part in layer.modules() if isinstance(part, FormattedModule)] for layer in layers]
    looks = [(layer.letter, *(name for name, _ in adapters(layer))) for layer in layers]
    kinds = [(*look, *names) for look, names in zip(looks, formats, strict=True)]
    sizes = [(*look, *(COMPUTE_DTYPE[name] for name in names)) for look, names in zip(looks, formats, strict=True)]

    def labels_of(numbers: Sequence[int]) -> list[tuple]:
        around = [None, None, *(sizes[number] for number in numbers), None, None]
        return [(kinds[number], *around[place : place + 5]) for place, number in enumerate(numbers)]

    left = [*range(len(layers))]
    labels = labels_of(left)
    first = 0
    while first < len(left) - 1:
        for last in range(len(left) - 2, first, -1):
            shorter = left[: first + 1] + left[last + 1 :]
            if sizes[left[first]] == sizes[left[last]] and set(labels_of(shorter)) == set(labels):
                left = shorter
                break
        else:
            first += 1
    return left, [labels_of(left).index(label) for label in labels]


def _repeated(network: Network, repeats: Sequence[int], parts: Callable[[nn.Module], Iterable[Tensor]]) -> list[Tensor]:
    """Return parameters or buffers, those of a layer as often as it is repeated."""
    layers = network.backbone.layers
    inside = set(parts(layers))
    outside = [tensor for tensor in parts(network) if tensor not in inside]
    return [*(tensor for place in repeats for tensor in parts(layers[place])), *outside]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
