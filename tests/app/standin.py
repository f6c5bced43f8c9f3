"""A tiny stage and data that keep the contract of the real ones, so that the program is tested in seconds.

The stage is the real one with a network of one MLP and randomness in training; the data come from a loader with worker
processes.
"""

import dataclasses
import resource
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import StageData
from modules.backbone.config import BackboneConfig
from modules.base import MicroBatchLoss
from modules.batch import IGNORED_LABEL, PackedBatch, Progress, Window
from modules.errors import UserError
from modules.optim.adamw import OptimizerConfig
from modules.optim.schedule import ScheduleConfig
from modules.precision.recipe import PrecisionConfig
from modules.pretraining import Pretraining

VOCABULARY = 16
LENGTH = 8


class Model(Pretraining):
    """Stand-in for a stage.

    Args:
        width: hidden width.
        rate: learning rate.
        decay: weight decay.
        extra: add a layer.
        dropout: share of labels left out in training.
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
        if width < 1:
            raise UserError(f"model.init_args.width is {width}: it must be at least 1")
        super().__init__(
            backbone=BackboneConfig(
                vocab_size=VOCABULARY,
                hidden_size=width,
                hybrid_override_pattern="--" if extra else "-",
                intermediate_size=2 * width,
                initializer_range=0.3,
            ),
            precision=PrecisionConfig(recipe="fp32"),
            optimizer=OptimizerConfig(learning_rate=rate, weight_decay=decay),
            schedule=ScheduleConfig(warmup_tokens=10 * 8 * LENGTH),
            mtp_depths=0,
        )
        self.dropout, self.fail_at, self.loss_file = dropout, fail_at, loss_file

    def micro_batch_loss(self, batch: PackedBatch, totals: Mapping[str, Tensor]) -> MicroBatchLoss:
        if self.fail_at is not None and self.trainer.global_step == self.fail_at:
            raise RuntimeError("a defect")
        dropped = torch.rand(batch.labels.shape) < self.dropout
        labels = torch.where(dropped, IGNORED_LABEL, batch.labels)
        return super().micro_batch_loss(dataclasses.replace(batch, labels=labels), totals)

    def on_train_batch_end(self, outputs: object, batch: Window, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.loss_file is not None and self.trainer.is_global_zero:
            with self.loss_file.open("a") as file:
                file.write(f"{batch.step} {float(self.metrics['training/loss']).hex()}\n")


class Rows(Dataset):
    def __init__(self, seed: int):
        self.seed = seed

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + index)
        start = torch.randint(VOCABULARY, (1,), generator=generator)
        return (start + 3 * torch.arange(LENGTH + 1)) % VOCABULARY


def pack(rows: list[Tensor]) -> PackedBatch:
    tokens = torch.stack(rows)
    ids = torch.zeros(len(rows), LENGTH, dtype=torch.int32)
    return PackedBatch(tokens=tokens[:, :-1], labels=tokens[:, 1:], document_ids=ids)


class Data(StageData):
    """Stand-in for the data.

    Args:
        steps: optimiser steps of the run.
        global_batch_size: rows per step.
        micro_batch_size: rows per device and micro-batch.
        num_workers: loader workers.
        missing: file that setup opens, to try a missing one.
    """

    vocab_size = VOCABULARY
    tokenizer_folder = Path("nowhere")

    def __init__(
        self,
        steps: int = 12,
        global_batch_size: int = 8,
        micro_batch_size: int = 2,
        num_workers: int = 0,
        missing: Path | None = None,
    ) -> None:
        super().__init__(LENGTH, micro_batch_size)
        self.global_batch_size, self.num_workers, self.missing = global_batch_size, num_workers, missing
        rows = steps * global_batch_size
        self.total = Progress(steps=steps, tokens=rows * LENGTH, samples=rows)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.missing is not None:
            self.missing.read_text()
        self.micro_batches = self.global_batch_size // (self.micro_batch_size * self.ranks)

    def windows(self, first: int) -> Iterator[Window]:
        batches = [
            [
                step * self.global_batch_size + self.rank + self.ranks * (part * self.micro_batch_size + row)
                for row in range(self.micro_batch_size)
            ]
            for step in range(first, self.total.steps)
            for part in range(self.micro_batches)
        ]
        loader = DataLoader(Rows(0), batch_sampler=batches, num_workers=self.num_workers, collate_fn=pack)
        packed = iter(loader)
        for step in range(first, self.total.steps):
            yield Window(
                step=step + 1,
                micro_batches=[next(packed) for _ in range(self.micro_batches)],
                tokens=self.global_batch_size * LENGTH,
                samples=self.global_batch_size,
            )

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Rows(10**6), batch_size=4, collate_fn=pack)

    test_dataloader = val_dataloader

    def token_bytes(self) -> Tensor:
        return torch.full((VOCABULARY,), 3)

    def gzip_bits_per_byte(self) -> float:
        return 1.8

    def consumed(self, step: int) -> dict[str, SimpleNamespace]:
        return {"rows": SimpleNamespace(rows=step * self.global_batch_size, epochs=0.5)}

    def asked(self, step: int) -> dict[str, float]:
        return {"rows": 1.0}


class NeedsPackage(CSVLogger):
    """A logger whose package is not there."""

    def __init__(self) -> None:
        import no_such_package  # noqa: F401  # pyright: ignore[reportMissingImports]


class Stop(Callback):
    """Asks the run to stop in the middle of a step.

    Args:
        step: steps done by then.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        trainer.should_stop |= trainer.global_step == self.step


class Wait(Callback):
    """Makes steps long.

    Args:
        seconds: at the end of each; long enough for whoever watches, unless given.
    """

    def __init__(self, seconds: float = 60) -> None:
        self.seconds = seconds

    def on_train_batch_end(self, *_: object) -> None:
        print("waiting", flush=True)
        time.sleep(self.seconds)


class SmallDisk(Callback):
    """Limits the size of files from a step on; the system then says what it says of a full disk, in the same calls.

    Args:
        size: bytes.
        step: steps done by then.
    """

    def __init__(self, size: int, step: int = 0) -> None:
        self.size, self.step = size, step

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step >= self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))
