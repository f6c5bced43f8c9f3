"""A small model and data that keep the contract of the real ones, so that the program is tested in seconds.

The network has buffers, sharding units and randomness in training (dropout), the data come from a stateful loader with
worker processes and whole accumulation windows.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from modules.errors import UserError

VOCABULARY = 16
LENGTH = 8


class Unit(NamedTuple):
    modules: list[nn.Module]
    dtype: torch.dtype | None


class Network(nn.Module):
    mtp = None

    def __init__(self, width: int, extra: bool, dropout: float):
        super().__init__()
        self.embeddings = nn.Embedding(VOCABULARY, width)
        self.block = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)
        if extra:
            self.extra = nn.Parameter(torch.zeros(width))
        self.register_buffer("bias", torch.zeros(VOCABULARY))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embeddings(tokens)
        return self.head(self.norm(hidden + self.block(hidden))) + self.bias

    def sharding_units(self) -> list[Unit]:
        return [
            Unit([self.block], None),
            Unit([self.embeddings, self.head], torch.float32),
            Unit([self], torch.float32),
        ]


class Model(LightningModule):
    """Stand-in for a stage.

    Args:
        width: hidden width.
        rate: learning rate.
        decay: weight decay.
        extra: add a parameter.
        dropout: share of values set to zero in training.
        fail_at: raise at this step, as a defect of the program would.
        loss_file: append (step, loss) in hexadecimal to this file.
    """

    def __init__(
        self,
        width: int = 16,
        rate: float = 1e-2,
        decay: float = 0.1,
        extra: bool = False,
        dropout: float = 0.1,
        fail_at: int | None = None,
        loss_file: Path | None = None,
    ) -> None:
        super().__init__()
        if width < 1:
            raise UserError(f"model.init_args.width is {width}: it must be at least 1")
        self.width, self.rate, self.decay, self.extra = width, rate, decay, extra
        self.dropout, self.fail_at, self.loss_file = dropout, fail_at, loss_file
        self.metrics: dict[str, Tensor] = {}
        self.sums: list[Tensor] = []
        self.network: Network | None = None

    def configure_model(self) -> None:
        if self.network is not None:
            return
        with torch.device("meta"):
            network = Network(self.width, self.extra, self.dropout)
        self.trainer.strategy.shard(network)
        network.to_empty(device=self.trainer.strategy.root_device)
        for index, (name, tensor) in enumerate(sorted(network.state_dict().items())):
            generator = torch.Generator().manual_seed(index)
            values = torch.randn(tensor.shape, generator=generator) * (0 if name in {"bias", "extra"} else 0.3)
            local = getattr(tensor, "to_local", lambda tensor=tensor: tensor)()
            if local is tensor:
                tensor.copy_(values)
            else:
                from torch.distributed.tensor import distribute_tensor

                local.copy_(distribute_tensor(values, tensor.device_mesh, tensor.placements).to_local())
        self.network = network

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.network.parameters(), lr=self.rate, weight_decay=self.decay)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.network(batch["tokens"])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.fail_at is not None and self.trainer.global_step == self.fail_at:
            raise RuntimeError("a defect")
        count = int(batch["count"][0]) * self.trainer.world_size
        loss = self.loss(batch) / count
        self.sums.append(loss.detach())
        return loss * self.trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        factor = 1 - self.trainer.global_step / max(self.trainer.datamodule.steps, 1)
        for group in optimizer.param_groups:
            group["lr"] = self.rate * factor
        loss = torch.stack(self.sums).sum()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(loss)
        self.metrics = {"training/loss": loss, "training/learning_rate": torch.tensor(self.rate * factor)}
        self.sums = []
        self.network.bias += 1e-3 * torch.sign(loss - 2)

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        step = self.trainer.global_step
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
        if step % self.trainer.log_every_n_steps == 0:
            self.trainer.logger.log_metrics({name: float(value) for name, value in self.metrics.items()}, step)
        if self.loss_file is not None and self.trainer.is_global_zero:
            with self.loss_file.open("a") as file:
                file.write(f"{step} {float(self.metrics['training/loss']).hex()}\n")

    def on_validation_epoch_start(self) -> None:
        self.validation = []

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validation.append(self.loss(batch) / batch["labels"].numel())

    def on_validation_epoch_end(self) -> None:
        loss = torch.stack(self.validation).mean()
        metrics = {"validation/loss": loss, "validation/bits_per_byte": loss / 3}
        self.log_dict(metrics, logger=False, rank_zero_only=True)
        if self.trainer.logger is not None:
            self.trainer.logger.log_metrics({k: float(v) for k, v in metrics.items()}, self.trainer.global_step)

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end


class Rows(Dataset):
    def __init__(self, rows: int, seed: int):
        self.rows, self.seed = rows, seed

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed + index)
        start = torch.randint(VOCABULARY, (1,), generator=generator)
        tokens = (start + 3 * torch.arange(LENGTH + 1)) % VOCABULARY
        return {"tokens": tokens[:-1], "labels": tokens[1:]}


class Loader:
    """Whole windows of micro-batches from a step on; its state is the number of windows consumed."""

    def __init__(self, data: "Data", rank: int, ranks: int):
        self.data, self.rank, self.ranks, self.step = data, rank, ranks, 0

    def __len__(self) -> int:
        return self.data.steps * self.data.accumulation(self.ranks)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        data, window = self.data, self.data.accumulation(self.ranks)
        batches = [
            [
                step * data.global_batch_size + self.rank + self.ranks * (part * data.micro_batch_size + row)
                for row in range(data.micro_batch_size)
            ]
            for step in range(self.step, data.steps)
            for part in range(window)
        ]
        loader = DataLoader(Rows(10**6, 0), batch_sampler=batches, num_workers=data.num_workers)
        count = torch.tensor([window * data.micro_batch_size * LENGTH])
        for index, batch in enumerate(loader):
            if (index + 1) % window == 0:
                self.step += 1
            yield {**batch, "count": count}

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


class Data(LightningDataModule):
    """Stand-in for the data.

    Args:
        steps: optimiser steps of the run.
        global_batch_size: rows per step.
        micro_batch_size: rows per device and micro-batch.
        num_workers: loader workers.
        missing: file that setup opens, to try a missing one.
    """

    gzip_bits_per_byte = 1.8

    def __init__(
        self,
        steps: int = 12,
        global_batch_size: int = 8,
        micro_batch_size: int = 2,
        num_workers: int = 0,
        missing: Path | None = None,
    ) -> None:
        super().__init__()
        self.steps, self.global_batch_size, self.micro_batch_size = steps, global_batch_size, micro_batch_size
        self.num_workers, self.missing = num_workers, missing

    def accumulation(self, ranks: int) -> int:
        return self.global_batch_size // (self.micro_batch_size * ranks)

    def tokens_at(self, step: int) -> int:
        return step * self.global_batch_size * LENGTH

    def consumed(self, step: int) -> dict[str, SimpleNamespace]:
        return {"rows": SimpleNamespace(rows=step * self.global_batch_size, epochs=0.5)}

    def asked(self, step: int) -> dict[str, float]:
        return {"rows": 1.0}

    def sample_prompts(self, n: int, length: int) -> list[list[int]]:
        return []

    @functools.cached_property
    def total_tokens(self) -> int:
        return self.tokens_at(self.steps)

    def setup(self, stage: str) -> None:
        if self.missing is not None:
            self.missing.read_text()
        place = self.trainer.strategy.distributed_sampler_kwargs
        self.rank, self.ranks = place["rank"], place["num_replicas"]
        self.trainer.accumulate_grad_batches = self.accumulation(self.ranks)

    def train_dataloader(self) -> Loader:
        return Loader(self, self.rank, self.ranks)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Rows(8, 10**6), batch_size=4)

    test_dataloader = val_dataloader


class Stop(Callback):
    """Asks the run to stop inside the window after a step.

    Args:
        step: steps done by then.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if trainer.global_step == self.step and batch_idx % trainer.accumulate_grad_batches == 1:
            trainer.should_stop = True
