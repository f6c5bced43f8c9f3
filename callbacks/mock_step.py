"""A full-size step on random tokens before any data are read: a lack of memory shows in the first minute.

Without it the first real step would show it too, but after a validation; and the second and not the first, since only
the second has the optimiser's moments from the start. So the mock step runs at what a step costs from then on: moments
there, and two micro-batches where a step has several. One document fills each row and every position has a
label. It leaves no trace: weights, moments, counters and random numbers are what they were, bit for bit, and so is the
run that follows.
"""

import resource
import sys
import time

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from callbacks.step import StepCallback, data, stage
from callbacks.text import entry
from modules.base import StageModule
from modules.batch import PackedBatch
from modules.errors import UserError
from modules.metrics import Metrics
from modules.optim.adamw import AdamW

GIB = 2**30
NO_MEMORY = ("can't allocate memory", "std::bad_alloc")
"""What a RuntimeError says when the allocator of a CPU gets no memory."""


class MockStep(StepCallback):
    """Tries a step before training.

    Args:
        enabled: Costs about the time of one micro-batch.
    """

    order = -1  # before the first validation

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the step and print its time and the peak of memory.

        Raises:
            UserError: memory does not suffice.
        """
        if not self.enabled:
            return
        module, source = stage(pl_module), data(trainer)
        rows, length = source.micro_batch_size, source.sequence_length
        batch = module.mock_batch(rows, length).to(pl_module.device)
        memory, started = PeakMemory(pl_module.device), time.perf_counter()
        try:
            with isolate_rng():
                mock_step(module, [batch] * min(source.micro_batches, 2))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            mend = _mend(rows, module.activation_checkpointing)
            raise UserError(
                f"out of memory: a step with {rows} rows of {length} tokens at a time does not fit on "
                f"{trainer.world_size} x {pl_module.device.type}; {mend}"
            ) from error
        used = memory.read()
        if trainer.is_global_zero:
            seconds = time.perf_counter() - started
            print(entry("mock step", f"{rows} rows of {length} random tokens: {seconds:.2f} s, {used}"), flush=True)


def mock_step(module: StageModule, micro_batches: list[PackedBatch]) -> None:
    """Run forward, backward and a skipped optimiser step, and remove what they leave behind."""
    (optimizer,) = module.trainer.optimizers
    assert isinstance(optimizer, AdamW)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    new = [parameter for parameter in parameters if parameter not in optimizer.state]
    optimizer.found_inf = torch.ones((), device=micro_batches[0].tokens.device)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # only makes the moments
    optimizer.zero_grad()
    module.switch_formats(module.data.progress.tokens)
    recorded, module.metrics = module.metrics, Metrics()  # what a stage tells of random tokens is of no step
    totals = module.totals(micro_batches)
    for number, batch in enumerate(micro_batches, start=1):
        module.strategy.sync_gradients(module.built_network, number == len(micro_batches))
        module.micro_batch_loss(batch, totals).loss.backward()
    module.metrics = recorded
    optimizer.step()
    optimizer.zero_grad()
    for parameter in new:
        del optimizer.state[parameter]
    optimizer.found_inf = None


class PeakMemory:
    """Reads the peak of memory in use since it was made.

    Args:
        device: whose memory; for a CPU that of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._before = _process_peak()

    def read(self) -> str:
        """Return the peak as text; waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            peak = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            total = torch.cuda.get_device_properties(self._device).total_memory
            return f"peak memory {peak / GIB:.2f} of {total / GIB:.1f} GiB"
        peak = _process_peak()
        return f"peak memory {peak / GIB:.2f} GiB, {(peak - self._before) / GIB:.2f} by this step"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is a lack of memory, on CUDA or on a CPU."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(text in str(error) for text in NO_MEMORY)


def _mend(rows: int, checkpointed: bool) -> str:
    mends = []
    if rows > 1:
        mends.append(f"lower data.init_args.micro_batch_size (now {rows}; the result stays the same)")
    if not checkpointed:
        mends.append("set model.init_args.activation_checkpointing: true")
    return " or ".join(mends) or "take more devices or a smaller model.init_args.backbone (both " + (
        "data.init_args.micro_batch_size 1 and activation_checkpointing are set)"
    )


def _process_peak() -> int:
    """Return the most bytes that this process has ever had in memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
