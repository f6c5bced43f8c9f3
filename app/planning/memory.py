"""The memory of a training step: live tensor storages, counted while the step runs on the meta device.

Nothing here knows the network: forward pass, chunked loss, backward pass and optimiser really run, without data, so
the count stays right when operations change. What is counted are the bytes of tensors; an allocator adds to them
(CUDA's rounds up and fragments), and a process has more than tensors.
"""

import copy
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from app.planning.meta import MetaExecution, UnknownValueError
from modules.backbone.model import Network
from modules.base import StageModule
from modules.batch import PackedBatch
from modules.ops import cross_entropy
from modules.optim.clipping import clip_gradients


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of one device that holds everything; a step is an optimiser step."""

    weights: int
    """Parameters and buffers."""
    gradients: int
    """Gradients of all parameters."""
    optimizer: int
    """State of the optimiser."""
    batch: int
    """The micro-batch."""
    kept: int
    """What the forward pass keeps for the backward pass."""
    forward_peak: int
    """Most that the forward pass and loss hold at once, beside weights, gradients, optimiser and batch."""
    backward_peak: int
    """Most that the backward pass holds at once beside weights, optimiser and batch; gradients included."""
    update_peak: int
    """Most that clipping and the optimiser hold at once beside weights, gradients, optimiser and batch."""
    accumulates: bool
    """Whether a step has several micro-batches, whose gradients add up."""

    @property
    def peak(self) -> int:
        """Most that any step but the first holds at once (the gradients of the step before are freed after the
        forward pass, by Lightning's order).
        """
        forward, update = self.gradients + self.forward_peak, self.gradients + self.update_peak
        return self.weights + self.optimizer + self.batch + max(forward, self.backward_peak, update)

    @property
    def first_peak(self) -> int:
        """Most that the first step holds at once: the optimiser's state is made at its end."""
        forward = self.forward_peak + (self.gradients if self.accumulates else 0)
        update = self.gradients + self.optimizer + self.update_peak
        return self.weights + self.batch + max(forward, self.backward_peak, update)


def measure_step(
    module: StageModule, documents: list[list[int]], accumulates: bool = False, device: str = "cpu"
) -> StepMemory:
    """Run a training step on the meta device and count its memory.

    Args:
        module: the stage, without a network.
        documents: lengths of the documents of each row of a micro-batch; rows have equal lengths.
        accumulates: whether a step has several micro-batches.
        device: kind of device the step is meant for, cpu or cuda; the portable operations run in either case.
    """
    try:
        return _measure(module, documents, accumulates, device, even_choices=False)
    except UnknownValueError:  # only experts of odd widths are split on the host
        return _measure(module, documents, accumulates, device, even_choices=True)


def _measure(
    module: StageModule, documents: list[list[int]], accumulates: bool, device: str, even_choices: bool
) -> StepMemory:
    network = module.build_network().train()
    live = LiveBytes()
    execution = MetaExecution(live.observe, even_choices)
    with _training(module, network, device) as trial:
        optimizer: Any = trial.configure_optimizers()
        optimizer.found_inf = torch.zeros((), device="meta")
        batch = _batch(execution, documents, getattr(module, "mtp_depths", 0))
        weights = live.add([*network.parameters(), *network.buffers()])
        held = weights + (batch_bytes := live.add(vars(batch).values()))
        gradients = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
        if accumulates:
            for parameter in network.parameters():
                parameter.grad = torch.empty_like(parameter)
            held += live.add(parameter.grad for parameter in network.parameters() if parameter.grad is not None)
        with execution.running():
            live.restart()
            loss = trial.micro_batch_loss(batch).loss
            kept, forward_peak = live.now - held, live.peak - held
            live.restart()
            loss.backward()
            del loss
            backward_peak = live.peak - weights - batch_bytes
            held = live.now
            live.restart()
            clip_gradients(network.parameters(), module.optimizer_config.gradient_clip_norm)
            clip_peak = live.peak - held
            live.restart()
            optimizer.step()
            state = sum(value.untyped_storage().nbytes() for value in _tensors(optimizer))
            update_peak = max(clip_peak, live.peak - held - state)
    return StepMemory(
        weights=weights,
        gradients=gradients,
        optimizer=state,
        batch=batch_bytes,
        kept=kept,
        forward_peak=forward_peak,
        backward_peak=backward_peak,
        update_peak=update_peak,
        accumulates=accumulates,
    )


@dataclass
class LiveBytes:
    """Bytes of the storages that are alive."""

    now: int = 0
    """Alive now."""
    peak: int = 0
    """Most since the last `restart`."""
    _known: dict[int, weakref.ref] = field(default_factory=dict)

    def observe(self, tensor: Tensor) -> None:
        """Count the storage of a tensor until it is freed; one that is counted already changes nothing."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()

        def free(_: object) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, free)
        self.now += size
        self.peak = max(self.peak, self.now)

    def add(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors and return their bytes."""
        before = self.now
        for tensor in tensors:
            self.observe(tensor)
        return self.now - before

    def restart(self) -> None:
        """Start a new peak."""
        self.peak = self.now


def _batch(execution: MetaExecution, documents: list[list[int]], depths: int) -> PackedBatch:
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in documents]).int()
    tokens = torch.empty(ids.shape, dtype=torch.int64, device="meta")
    counts = torch.empty(1 + depths, dtype=torch.int64, device="meta")
    return PackedBatch(
        tokens=tokens, labels=torch.empty_like(tokens), document_ids=execution.make_known(ids), counts=counts
    )


def _tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


@contextmanager
def _training(module: StageModule, network: Network, device: str) -> Iterator[StageModule]:
    """Yield a copy of `module` that trains a meta network as if it lay on a device of the given kind."""
    module = copy.deepcopy(module)
    module.network = network
    module._trainer = SimpleNamespace(accumulate_grad_batches=1, world_size=1)  # type: ignore[assignment]
    chunks = cross_entropy._CHUNK_LOGITS
    fused = "torch.optim.optimizer._get_fused_kernels_supported_devices"
    with patch.dict(chunks, {"meta": chunks[device]}), patch(fused, lambda: ["meta"]):
        yield module
