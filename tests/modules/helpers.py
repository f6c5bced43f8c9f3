"""Small networks, batches, trainers and comparisons that the module tests share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import lightning
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from app.loop import use_step_loop
from callbacks.dashboard import Dashboard
from datamodules.base import StageData
from modules.backbone.config import BackboneConfig
from modules.backbone.initialization import initialize
from modules.backbone.model import Network
from modules.batch import (
    IGNORED_LABEL,
    ConversationBatch,
    PackedBatch,
    Progress,
    Window,
    count_targets,
    next_token_labels,
)
from modules.optim.adamw import OptimizerConfig
from modules.optim.schedule import ScheduleConfig
from modules.precision import e2m1, nvfp4
from modules.precision.formats import broadcast_scale
from modules.precision.hadamard import SIGNS
from modules.precision.quantized import QuantizedWeight, gemm_values
from modules.precision.recipe import PrecisionConfig, assign_formats
from modules.pretraining import Pretraining

FP32 = PrecisionConfig(recipe="fp32")
BF16 = PrecisionConfig(recipe="bf16")


def tiny_config(**changes) -> BackboneConfig:
    """A configuration with every kind of layer and an MTP block, small enough to run in milliseconds."""
    fields = {
        "vocab_size": 64,
        "hidden_size": 32,
        "hybrid_override_pattern": "ME*-ME",
        "initializer_range": 0.15,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "moe_latent_size": 16,
        "moe_shared_expert_intermediate_size": 40,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
    }
    return BackboneConfig(**{**fields, **changes})


def make_network(config: BackboneConfig, recipe=FP32, seed: int = 0) -> Network:
    """A materialised network whose norms, skips, biases and router biases all differ from their neutral start."""
    network = Network(config)
    assign_formats(recipe, network)
    initialize(network, seed)
    perturb(network, seed)
    return network


@torch.no_grad()
def perturb(module: nn.Module, seed: int = 0) -> None:
    """Move every vector and every router bias away from a value that would hide a mistake."""
    generator = torch.Generator().manual_seed(seed + 1)
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    for tensor in [*module.parameters(), *buffers]:
        if tensor.ndim == 1:
            tensor += 0.2 * torch.randn(tensor.shape, generator=generator)


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest difference over the largest expected value (at least `floor`)."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max().item()
    scale = max(expected.double().abs().max().item(), floor)
    return difference / scale if scale else difference


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "", floor: float = 0.0) -> None:
    """Hold the relative error (see `relative_error`) to a tolerance; NaN fails."""
    error = relative_error(actual, expected, floor)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name; zeros where there is none."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in module.named_parameters()
    }


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare gradients tensor by tensor; names must be equal.

    A gradient that is zero but for rounding (the router's, for a normalised top 1) has no relative error: none is
    measured against less than 1e-5 of the largest gradient.
    """
    assert actual.keys() == expected.keys()
    floor = 1e-5 * max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, tolerance, f"gradient of {name}", floor)


def document_ids(*rows: list[int]) -> Tensor:
    """int32 [B, T] from the document lengths of each row."""
    return torch.stack(
        [torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)) for lengths in rows]
    ).int()


def spans(ids: Tensor) -> list[tuple[int, slice]]:
    """(row, positions) of every document of [B, T] ids, by a plain loop."""
    found = []
    for row, values in enumerate(ids.tolist()):
        start = 0
        for position in range(1, len(values) + 1):
            if position == len(values) or values[position] != values[start]:
                found.append((row, slice(start, position)))
                start = position
    return found


def packed_batch(ids: Tensor, vocab_size: int, seed: int = 0, masked: float = 0.0) -> PackedBatch:
    """Random tokens in the given documents; a share `masked` of the labels is dropped."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, ids.shape, generator=generator)
    labels = next_token_labels(tokens, ids)
    if masked:
        labels = torch.where(torch.rand(ids.shape, generator=generator) < masked, -100, labels)
    return PackedBatch(tokens=tokens, labels=labels, document_ids=ids)


def conversations(ids: Tensor, seed: int = 0, masked: float = 0.5) -> ConversationBatch:
    """Random tokens in the given documents, a share of them without loss; each conversation has a weight of its own."""
    batch = packed_batch(ids, 64, seed, masked)
    drawn = 0.5 + torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed))
    weights = drawn.gather(1, ids.long()) * (batch.labels != IGNORED_LABEL)
    return ConversationBatch(**vars(batch), loss_weights=weights)


def counts_of(batch: PackedBatch, depths: int) -> Tensor:
    """int64 [1 + M]: the targets of a batch."""
    return count_targets(batch.labels, batch.document_ids, depths)


_ROW_DOCUMENTS = [[16], [1, 15], [1] * 16, [4, 4, 8], [2, 2, 2, 10], [9, 7], [15, 1], [3, 13]]


def row_batches(count: int = 8, masked: tuple[float, ...] = (0.0, 0.9)) -> list[PackedBatch]:
    """Micro-batches of one row with very different numbers of targets."""
    return [
        packed_batch(document_ids(_ROW_DOCUMENTS[index % 8]), 64, seed=index, masked=masked[index % len(masked)])
        for index in range(count)
    ]


class LocalStrategy(SingleDeviceStrategy):
    """One device, nothing sharded: the least a LightningModule of ours can run under."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    distributed_sampler_kwargs: ClassVar = {"rank": 0, "num_replicas": 1}

    def shard(self, network: nn.Module) -> None:
        pass

    @contextmanager
    def lend(self, head):
        yield head.logits

    def sync_gradients(self, network: nn.Module, sync: bool) -> None:
        pass

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        return tensor


class ListData(StageData):
    """Serves prepared micro-batches; `window` of them make a step."""

    tokenizer_folder = Path("nowhere")

    def __init__(self, batches: list[PackedBatch], window: int = 1, vocab_size: int = 64, validation=None) -> None:
        super().__init__(sequence_length=16, micro_batch_size=1)
        self.batches, self.micro_batches, self.vocab_size, self.validation = batches, window, vocab_size, validation
        self.total = Progress()
        for step in self.windows(0):
            self.total = self.total.after(step)

    def windows(self, first: int) -> Iterator[Window]:
        for step in range(first, -(-len(self.batches) // self.micro_batches)):
            batches = self.batches[step * self.micro_batches : (step + 1) * self.micro_batches]
            tokens, rows = sum(batch.tokens.numel() for batch in batches), sum(len(batch.tokens) for batch in batches)
            yield Window(step=step + 1, micro_batches=batches, tokens=tokens, samples=rows)

    def token_bytes(self) -> Tensor:
        return torch.arange(self.vocab_size) % 5

    def gzip_bits_per_byte(self) -> None:
        return None

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, batch_size=None)


class Collector(lightning.Callback):
    """Keeps the metrics of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.steps.append({name: float(value) for name, value in pl_module.metrics.items()})


def make_module(config: BackboneConfig | None = None, cls=Pretraining, **changes) -> Pretraining:
    """A pretraining module with the settings the tests do not care about filled in."""
    settings = {
        "backbone": config or tiny_config(),
        "precision": FP32,
        "optimizer": OptimizerConfig(learning_rate=1e-2),
        "schedule": ScheduleConfig(),
        "mtp_depths": 2,
    }
    return cls(**{**settings, **changes})


def make_trainer(**changes) -> lightning.Trainer:
    """A silent trainer on `LocalStrategy`."""
    settings = {
        "strategy": LocalStrategy(),
        "accelerator": "cpu",
        "max_epochs": 1,
        "check_val_every_n_epoch": None,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return lightning.Trainer(**{**settings, **changes})


def fit(module: Pretraining, data: ListData, **trainer_changes) -> lightning.Trainer:
    """Train over all micro-batches of `data` under our loop; a logger gets what is recorded."""
    unused = {} if data.validation else {"limit_val_batches": 0}
    if trainer_changes.get("logger"):
        trainer_changes["callbacks"] = [*trainer_changes.get("callbacks", []), Dashboard(10**9)]
    trainer = make_trainer(**unused, **trainer_changes)
    use_step_loop(trainer)
    trainer.fit(module, data)
    return trainer


def build(module: Pretraining, vocab_size: int = 64, data: type[ListData] = ListData) -> Network:
    """Run `configure_model` as a trainer does, without training."""
    module.trainer = make_trainer()
    module.trainer.datamodule = data([], vocab_size=vocab_size)
    module.configure_model()
    return module.built_network


def network_state(module: Pretraining) -> dict[str, Tensor]:
    """Copies of all tensors of the module's network."""
    return {name: tensor.clone() for name, tensor in module.built_network.state_dict().items()}


def dequantize_weight(weight: QuantizedWeight) -> Tensor:
    """The fp32 numbers [O, I] that a quantised weight means."""
    return gemm_values(weight).float() * weight.scale


def dequantize_nvfp4(quantized: nvfp4.NVFP4) -> Tensor:
    """The fp32 numbers [..., K] of a quantised tensor."""
    values = e2m1.decode(quantized.codes).unflatten(-1, (-1, nvfp4.BLOCK))
    scales = quantized.scales.float() / broadcast_scale(quantized.inverse_scale, quantized.scales.ndim)
    return (values * scales.unsqueeze(-1)).flatten(-2)


def hadamard_matrix() -> Tensor:
    """fp32 [16, 16]: diag(SIGNS) H / 4 with Sylvester's H; its transpose is its inverse."""
    matrix = torch.ones(1, 1)
    for _ in range(4):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return torch.tensor(SIGNS).unsqueeze(1) * matrix / 4
