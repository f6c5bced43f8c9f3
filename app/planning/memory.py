"""The memory of a training step: live tensor storages, counted while the step runs on the meta device.

Nothing here knows the network: forward pass, chunked loss, backward pass and optimiser really run, without data, so
the count stays right when operations change. What is counted are the bytes of tensors; an allocator adds to them
(CUDA's rounds up and fragments), and a process has more than tensors.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from app.planning.live import LiveBytes
from app.planning.meta import MetaExecution
from app.planning.sharding import Sharding, replace_by_shards
from modules.backbone.model import Network
from modules.base import StageModule
from modules.batch import PackedBatch
from modules.ops import chunked_head
from modules.ops.documents import document_boundaries
from modules.optim.clipping import clip_gradients


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes that a device holds; a step is an optimiser step."""

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
    loss_peak: int
    """Most that the head and the loss hold at once: logits of a chunk, gradients of the head and its inputs."""
    gathered_peak: int
    """Most that FSDP2 holds at once in whole weights of single units and in buffers."""
    accumulates: bool
    """Whether a step has several micro-batches, whose gradients add up."""

    @property
    def peak(self) -> int:
        """Most that any step but the first holds."""
        forward = self.forward_peak + (self.gradients if self.accumulates else 0)
        update = self.gradients + self.update_peak
        return self.weights + self.optimizer + self.batch + max(forward, self.backward_peak, update)

    @property
    def passing(self) -> int:
        """What a step holds at its peak beside weights, gradients, optimiser, batch and kept activations."""
        return self.peak - (self.weights + self.gradients + self.optimizer + self.batch + self.kept)

    @property
    def first_peak(self) -> int:
        """Most that the first step holds at once: the optimiser's state is made at its end."""
        forward = self.forward_peak + (self.gradients if self.accumulates else 0)
        update = self.gradients + self.optimizer + self.update_peak
        return self.weights + self.batch + max(forward, self.backward_peak, update)


def measure_step(
    module: StageModule,
    documents: list[list[int]],
    accumulates: bool = False,
    devices: int | None = None,
    kind: str = "cpu",
) -> StepMemory:
    """Run a training step on the meta device and count its memory.

    Args:
        module: the stage, without a network.
        documents: lengths of the documents of each row of a micro-batch; rows have equal lengths.
        accumulates: whether a step has several micro-batches.
        devices: over which FSDP2 lays the network, as `fit` does; None: a plain network on one device.
        kind: what the devices are, cpu or cuda; the portable operations run in either case.

    Returns:
        What the first of the devices holds.
    """
    live = LiveBytes()
    execution = MetaExecution(live.observe)
    computing = stored = module.build_network().train()
    sharding = None
    if devices is not None:
        stored = module.build_network()
        replace_by_shards(stored, devices)
        sharding = Sharding(computing, devices, live, accumulates)
    with _training(module, stored, kind) as trial:
        optimizer: Any = trial.configure_optimizers()
        optimizer.found_inf = torch.zeros((), device="meta")
        weights = live.add([*stored.parameters(), *stored.buffers()])
        batch = _batch(execution, documents)
        held = weights + (batch_bytes := live.add(batch.tensors().values()))
        if accumulates:
            held += live.add(_make_gradients(stored))
        trial.network = computing
        loss_peak = _watch(computing.lm_head, live)
        with execution.running():
            live.restart()
            totals = {name: value.float() for name, value in trial.count(batch).items()}
            loss = trial.micro_batch_loss(batch, totals).loss
            kept, forward_peak = live.now - held, live.peak - held
            live.restart()
            loss.backward()
            del loss
            if sharding is not None:
                sharding.finish_backward()
                backward_peak = live.peak - weights - batch_bytes
                sharding.gradients.clear()
                live.add(_make_gradients(stored))
            else:
                backward_peak = live.peak - weights - batch_bytes
            held = live.now
            live.restart()
            clip_gradients(stored.parameters(), module.optimizer_config.gradient_clip_norm)
            clip_peak = live.peak - held
            live.restart()
            optimizer.step()
            state = sum(value.untyped_storage().nbytes() for value in _tensors(optimizer))
            update_peak = max(clip_peak, live.peak - held - state)
    return StepMemory(
        weights=weights,
        gradients=sum(parameter.numel() * parameter.element_size() for parameter in stored.parameters()),
        optimizer=state,
        batch=batch_bytes,
        kept=kept,
        forward_peak=forward_peak,
        backward_peak=backward_peak,
        update_peak=update_peak,
        loss_peak=max(loss_peak),
        gathered_peak=0 if sharding is None else sharding.buffers.peak,
        accumulates=accumulates,
    )


def _watch(module: nn.Module, live: LiveBytes) -> list[int]:
    """Return a list that gets what each forward pass of `module` holds at most."""
    found: list[int] = []
    before: list[tuple[int, int]] = []

    def enter(*_: object) -> None:
        before.append((live.now, live.peak))
        live.restart()

    def leave(*_: object) -> None:
        start, peak = before.pop()
        found.append(live.peak - start)
        live.peak = max(live.peak, peak)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)
    return found


def _make_gradients(network: Network) -> Iterator[Tensor]:
    for parameter in network.parameters():
        parameter.grad = torch.empty_like(parameter)
        yield parameter.grad


def _batch(execution: MetaExecution, documents: list[list[int]]) -> PackedBatch:
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in documents]).int()
    tokens = torch.empty(ids.shape, dtype=torch.int64, device="meta")
    return PackedBatch(
        tokens=tokens,
        labels=torch.empty_like(tokens),
        document_ids=execution.make_known(ids),
        boundaries=document_boundaries(ids),
    )


def _tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


@contextmanager
def _training(module: StageModule, network: Network, kind: str) -> Iterator[StageModule]:
    """Yield a copy of `module` that trains a meta network as if it lay on a device of the given kind."""
    module = copy.deepcopy(module)
    module.network = network
    chunks = chunked_head.CHUNK_LOGITS
    fused = "torch.optim.optimizer._get_fused_kernels_supported_devices"
    with patch.dict(chunks, {"meta": chunks[kind]}), patch(fused, lambda: ["meta"]):
        yield module
