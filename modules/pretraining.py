"""Pretraining: next token and MTP over packed documents."""

import math
from typing import Any

import torch
from torch import Tensor

from modules.base import MicroBatchLoss, StageModule
from modules.batch import IGNORED_LABEL, PackedBatch
from modules.errors import UserError
from modules.objectives.next_token import next_token_loss, sequence_auxiliary_loss


class Pretraining(StageModule):
    """Pretrain a network on packed text.

    Args:
        mtp_depths: depths M the MTP block is trained at; 0 without an MTP block.
        mtp_loss_factor: weight of all MTP losses together, split over the depths.
        auxiliary_loss_coefficient: weight of the router's sequence-wise balance loss; 0 switches it off.
        stage: what every stage takes, see `StageModule`.

    Raises:
        UserError: if mtp_depths does not fit the network.
    """

    def __init__(
        self,
        mtp_depths: int = 2,
        mtp_loss_factor: float = 0.3,
        auxiliary_loss_coefficient: float = 1e-4,
        **stage: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**stage)
        backbone = self.backbone_config
        if (mtp_depths > 0) != (backbone.num_nextn_predict_layers > 0):
            raise UserError(
                f"model.mtp_depths: {mtp_depths} does not fit model.backbone.num_nextn_predict_layers "
                f"{backbone.num_nextn_predict_layers}; set both or neither to 0"
            )
        for key, value in (
            ("mtp_loss_factor", mtp_loss_factor),
            ("auxiliary_loss_coefficient", auxiliary_loss_coefficient),
        ):
            if not 0 <= value < math.inf:
                raise UserError(f"model.{key}: {value} must be finite and not negative")
        self.mtp_depths, self.mtp_loss_factor = mtp_depths, mtp_loss_factor
        self.auxiliary_loss_coefficient = auxiliary_loss_coefficient
        self._counts: Tensor | None = None
        self._validation_nats: Tensor | None = None
        self._validation_counts: Tensor | None = None

    def micro_batch_loss(self, batch: PackedBatch) -> MicroBatchLoss:
        """Compute next-token, MTP and auxiliary loss of one micro-batch."""
        if self._counts is None:
            self._counts = self.all_reduce(batch.counts)
        parts = next_token_loss(self.built_network, batch, self._counts, self.mtp_depths, self.mtp_loss_factor)
        means = parts.nats / self._counts.clamp(min=1)
        metrics = {"training/next_token_loss": means[0]}
        metrics |= {f"training/mtp_loss_{depth}": means[depth] for depth in range(1, self.mtp_depths + 1)}
        loss = parts.loss
        if self.auxiliary_loss_coefficient and parts.output.router:
            rows = len(batch.tokens) * self.trainer.accumulate_grad_batches * self.trainer.world_size
            balance = sequence_auxiliary_loss(parts.output.router) / rows
            metrics["training/auxiliary_loss"] = balance.detach()
            loss = loss + self.auxiliary_loss_coefficient * balance
        return MicroBatchLoss(loss, metrics, parts.output.router)

    def on_train_batch_start(self, batch: PackedBatch, batch_idx: int) -> None:
        """Forget the target counts of the window before."""
        super().on_train_batch_start(batch, batch_idx)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._counts = None

    def on_validation_epoch_start(self) -> None:
        """Start the sums."""
        self._validation_nats = torch.zeros((), device=self.device, dtype=torch.float64)
        self._validation_counts = torch.zeros(2, device=self.device, dtype=torch.int64)

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Add up nats, targets and the bytes the targets stand for."""
        assert self._validation_nats is not None
        assert self._validation_counts is not None
        loss = next_token_loss(self.built_network, batch, torch.ones(1, device=self.device), 0, 0.0)
        kept = batch.labels[batch.labels != IGNORED_LABEL]
        token_bytes = self.data.token_bytes.to(kept.device)
        self._validation_nats += loss.nats[0]
        targets = torch.tensor(kept.numel(), device=kept.device)
        self._validation_counts += torch.stack([targets, token_bytes[kept].sum()])

    def on_validation_epoch_end(self) -> None:
        """Log `validation/loss` (nats per token) and `validation/bits_per_byte`."""
        assert self._validation_nats is not None
        assert self._validation_counts is not None
        nats = self.all_reduce(self._validation_nats)
        targets, text_bytes = self.all_reduce(self._validation_counts)
        metrics = {
            "validation/loss": (nats / targets).float(),
            "validation/bits_per_byte": (nats / math.log(2) / text_bytes).float(),
        }
        self.log_dict(metrics, logger=False, rank_zero_only=True)
        self.write_metrics(metrics)

    def test_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """As `validation_step`."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_start(self) -> None:
        """As `on_validation_epoch_start`."""
        self.on_validation_epoch_start()

    def on_test_epoch_end(self) -> None:
        """As `on_validation_epoch_end`."""
        self.on_validation_epoch_end()
