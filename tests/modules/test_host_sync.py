"""A training step asks the device for nothing: no `.item()`, `.tolist()` or shape that depends on values.

The step runs on tensors without values (FakeTensor) as it does on CUDA, with stand-ins for the kernels, so that
a CPU is enough. What needs a value to go on raises: in the forward and backward pass, clipping, the optimiser,
Lightning's loop. `test_cuda.py` asks CUDA itself.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)

from modules.backbone import mlp
from modules.backbone.model import Network
from modules.batch import Window
from modules.ops import kernels
from modules.ops.documents import document_boundaries
from modules.precision.recipe import PrecisionConfig, assign_formats
from modules.pretraining import Pretraining
from tests.modules.helpers import (
    BF16,
    FP32,
    ListData,
    LocalStrategy,
    document_ids,
    fit,
    make_module,
    packed_batch,
    tiny_config,
)

NEEDS_A_VALUE = (DataDependentOutputException, DynamicOutputShapeException)


class FakeStrategy(LocalStrategy):
    """Takes the values of what is moved to the device."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode

    def model_to_device(self) -> None:
        pass

    def batch_to_device(self, batch: Window, **_) -> Window:
        return replace(batch, micro_batches=[part.map(self.mode.from_tensor) for part in batch.micro_batches])

    def teardown(self) -> None:
        pass


class OnHost(Pretraining):
    """What is done before a batch is moved is done with values."""

    def on_before_batch_transfer(self, batch: Window, dataloader_idx: int) -> Window:
        with unset_fake_temporarily():
            return super().on_before_batch_transfer(batch, dataloader_idx)


def scan(x, dt, A, B, C, chunk_size, *, D, dt_bias, dt_softplus, seq_idx) -> Tensor:
    """Something of the shape and dtype of mamba-ssm's result that depends on all inputs."""
    factors = dt * A + D + dt_bias + (B * C).sum((2, 3)).unsqueeze(-1)
    return (x * factors.unsqueeze(-1) * (seq_idx == 0)[..., None, None]).to(x.dtype)


def varlen_attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa) -> Tensor:
    """Something of the shape and dtype of torch's result that depends on all inputs."""
    return (query * (key * value).sum(1, keepdim=True) * cu_seq_q.sum()).to(query.dtype)


STAND_INS = {"mamba_chunk_scan_combined": scan, "varlen_attn": varlen_attention}


@pytest.fixture
def fake_cuda(monkeypatch):
    """Operations do with tensors without values what they do on CUDA, and the kernels are there."""
    monkeypatch.setattr(kernels, "_load", lambda module, attribute: (STAND_INS[attribute], "active"))
    with kernels.computing_on("cuda"):
        yield


def train(recipe=BF16, known_boundaries: bool = True, **module_changes) -> Pretraining:
    """Train two steps of two micro-batches on tensors without values; no step is one that is logged."""
    data = ListData([packed_batch(document_ids([5, 27], [32]), 64, seed=seed) for seed in range(4)], window=2)
    for batch in data.batches:
        batch.boundaries = document_boundaries(batch.document_ids) if known_boundaries else None
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # borders are values, on the host
        module = make_module(cls=OnHost, precision=recipe, **module_changes)
        module.network = Network(module.backbone_config)
        assign_formats(recipe, module.network)
        if module.activation_checkpointing:
            module.network.checkpoint_activations()
        fit(module, data, strategy=FakeStrategy(mode), log_every_n_steps=1000)
    return module


NO_EXPERTS = tiny_config(hybrid_override_pattern="M*-", mtp_hybrid_override_pattern="*M")
CASES = {
    "bf16": (BF16, {}),
    "bf16, checkpointed": (BF16, {"activation_checkpointing": True}),
    "bf16, odd widths": (BF16, {"config": tiny_config(moe_intermediate_size=13, moe_latent_size=11)}),
    # Random bits come from a generator on the device, which cannot be made without one.
    "nvfp4": (
        PrecisionConfig(bf16_tail=0, stochastic_rounding=False),
        {"config": tiny_config(moe_intermediate_size=20)},
    ),
    # `F.grouped_mm` has no fp32 kernel on CUDA: there it copies the offsets to the host.
    "fp32, no experts": (
        FP32,
        {"config": NO_EXPERTS},
    ),
}


@pytest.mark.parametrize(("recipe", "changes"), CASES.values(), ids=CASES.keys())
def test_a_step_needs_no_value(recipe, changes: dict, fake_cuda) -> None:
    module = train(recipe, **changes)
    assert module.trainer.global_step == 2
    assert all(isinstance(parameter, FakeTensor) for parameter in module.parameters())
    assert len(module.trainer.optimizers[0].state) == len(list(module.parameters())), "every parameter was updated"


def test_without_boundaries_the_attention_kernel_waits_for_them(fake_cuda) -> None:
    """Guards the test above: what comes with the batch is what nobody waits for."""
    with pytest.raises(NEEDS_A_VALUE, match="nonzero"):
        train(known_boundaries=False)


ASK: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x.sum() > 0),
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: x[x > 0],
    "repeats": lambda x: x.flatten().repeat_interleave((x > 0).flatten().long()),
    "unique": lambda x: x.unique(),
}


@pytest.mark.parametrize("ask", ASK.values(), ids=ASK.keys())
def test_a_layer_that_asks_for_a_value_is_found(ask: Callable[[Tensor], object], fake_cuda, monkeypatch) -> None:
    """Guards the first test against tensors without values that answer after all."""

    def asking(x: Tensor) -> Tensor:
        ask(x)
        return torch.relu(x)

    monkeypatch.setattr(mlp, "squared_relu", asking)
    with pytest.raises(NEEDS_A_VALUE):
        train()
