"""What the stages that learn given text share: next token, MTP, and the balance of the experts.

They differ in what a target counts (`StageModule.target_weights`), and in nothing else.
"""

import math
from abc import ABC
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from modules.base import MicroBatchLoss, StageModule
from modules.batch import PackedBatch
from modules.errors import UserError
from modules.objectives.next_token import divisors, loss_weights, next_token_loss, sequence_auxiliary_loss


class LanguageModeling(StageModule, ABC):
    """Learn to predict given text.

    Args:
        mtp_depths: depths M the MTP block is trained at; 0 without an MTP block.
        mtp_loss_factor: weight of all MTP losses together, split over the depths.
        auxiliary_loss_coefficient: weight of the router's sequence-wise balance loss; 0 switches it off.
        stage: what every stage takes, see `StageModule`.

    Raises:
        UserError: if a value is out of range, or mtp_depths does not fit the network.
    """

    def __init__(
        self,
        mtp_depths: int = 2,
        mtp_loss_factor: float = 0.3,
        auxiliary_loss_coefficient: float = 1e-4,
        **stage: Any,
    ) -> None:
        super().__init__(mtp_depths=mtp_depths, **stage)
        blocks = self.backbone_config.num_nextn_predict_layers
        if (mtp_depths > 0) != (blocks > 0):
            raise UserError(
                f"model.mtp_depths: {mtp_depths} does not fit model.backbone.num_nextn_predict_layers {blocks}; set "
                "both or neither to 0"
            )
        for key, value in (
            ("mtp_loss_factor", mtp_loss_factor),
            ("auxiliary_loss_coefficient", auxiliary_loss_coefficient),
        ):
            if not 0 <= value < math.inf:
                raise UserError(f"model.{key}: {value} must be finite and not negative")
        self.mtp_loss_factor, self.auxiliary_loss_coefficient = mtp_loss_factor, auxiliary_loss_coefficient

    def count(self, batch: PackedBatch) -> dict[str, Tensor]:
        """Add up what the targets of the next token and of each MTP depth count [1 + M]; count the rows."""
        targets = self.target_weights(batch, self.mtp_depths).flatten(1).double().sum(1)
        return {"targets": targets, "rows": targets.new_full((), len(batch.tokens))}

    def loss_weights(self, batch: PackedBatch, totals: Mapping[str, Tensor]) -> Tensor:
        """Return with which weight the nats of each target enter the loss of a step.

        Args:
            batch: one of its micro-batches.
            totals: the sums of what `count` returns over all of them.

        Returns:
            fp32 [1 + M, B, T]: of the next token, and of each MTP depth; 0 where there is no target.
        """
        return loss_weights(self.target_weights(batch, self.mtp_depths), totals["targets"], self.mtp_loss_factor)

    def micro_batch_loss(self, batch: PackedBatch, totals: Mapping[str, Tensor]) -> MicroBatchLoss:
        """Compute next-token, MTP and auxiliary loss of one micro-batch."""
        targets, weights = totals["targets"], self.target_weights(batch, self.mtp_depths)
        parts = next_token_loss(self.built_network, batch, targets, self.mtp_depths, self.mtp_loss_factor, weights)
        means = parts.nats / divisors(targets)
        metrics = {"training/next_token_loss": means[0]}
        metrics |= {f"training/mtp_loss_{depth}": means[depth] for depth in range(1, self.mtp_depths + 1)}
        loss = parts.loss
        if self.auxiliary_loss_coefficient and parts.output.router:
            balance = sequence_auxiliary_loss(parts.output.router) / totals["rows"]
            metrics["training/auxiliary_loss"] = balance.detach()
            loss = loss + self.auxiliary_loss_coefficient * balance
        return MicroBatchLoss(loss, metrics, parts.output.router, parts.token_nats)
