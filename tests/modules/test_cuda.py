"""Training on a CUDA device: the numbers of the CPU, and a host that never waits."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from modules.batch import PackedBatch
from modules.ops.documents import document_boundaries
from tests.modules.helpers import (
    BF16,
    FP32,
    Collector,
    ListData,
    assert_close,
    document_ids,
    fit,
    make_module,
    network_state,
    packed_batch,
    tiny_config,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

TOLERANCE = {"fp32": 5e-3, "bf16": 5e-2}


class CudaStrategy(SingleDeviceStrategy):
    """One CUDA device, nothing sharded."""

    def __init__(self) -> None:
        super().__init__(torch.device("cuda", 0))

    def shard(self, network: nn.Module) -> None:
        pass

    def sync_gradients(self, network: nn.Module, sync: bool) -> None:
        pass

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        return tensor


class NoWaiting(Callback):
    """Lets torch raise where the host waits, from the third step on: kernels are chosen and compiled before."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == 2:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, trainer, pl_module, exception) -> None:
        torch.cuda.set_sync_debug_mode("default")


def batches(count: int) -> list[PackedBatch]:
    made = [packed_batch(document_ids([5, 59], [64]), 64, seed=seed) for seed in range(count)]
    return [replace(batch, boundaries=document_boundaries(batch.document_ids)) for batch in made]


def config():
    return tiny_config(mamba_head_dim=16, mamba_num_heads=4, ssm_state_size=16, chunk_size=32, head_dim=16)


def test_the_host_never_waits_in_a_step() -> None:
    """bf16: `F.grouped_mm` has no fp32 kernel and copies the offsets to the host there."""
    module = make_module(config(), precision=BF16, activation_checkpointing=True)
    data = ListData(batches(10), window=2)
    fit(module, data, strategy=CudaStrategy(), accelerator="cuda", log_every_n_steps=1000, callbacks=[NoWaiting()])
    assert module.trainer.global_step == 5


def steps_on(device: str, recipe) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    module, collector = make_module(config(), precision=recipe), Collector()
    changes = {"strategy": CudaStrategy(), "accelerator": "cuda"} if device == "cuda" else {}
    fit(module, ListData(batches(4), window=2), callbacks=[collector], **changes)
    return collector.steps, network_state(module)


@pytest.mark.parametrize("recipe", [FP32, BF16], ids=["fp32", "bf16"])
def test_steps_equal_those_on_the_cpu(recipe) -> None:
    (actual, state), (expected, _) = steps_on("cuda", recipe), steps_on("cpu", recipe)
    tolerance = TOLERANCE[recipe[0].format]
    for step, expected_step in zip(actual, expected, strict=True):
        for name in ("training/loss", "training/next_token_loss", "training/mtp_loss_1"):
            assert_close(torch.tensor(step[name]), torch.tensor(expected_step[name]), tolerance, name)
    assert all(tensor.isfinite().all() for tensor in state.values())
