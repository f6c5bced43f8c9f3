"""The clipped ratio of PPO (arXiv 1707.06347, eq. 7) with an entropy term: a stage as a user would write one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modules.base import MicroBatchLoss, StageModule
from modules.batch import IGNORED_LABEL, PackedBatch
from tests.stages.data import Annotated


class ClippedRatio(StageModule):
    """Raise the probability of tokens with an advantage, within a trust region.

    Args:
        clip: how far a ratio may be from 1.
        entropy_factor: weight of the entropy.
        stage: what every stage takes.
    """

    def __init__(self, clip: float = 0.2, entropy_factor: float = 0.01, **stage: Any) -> None:
        super().__init__(**stage)
        self.clip, self.entropy_factor = clip, entropy_factor

    def add_fields(self, batch: PackedBatch) -> Annotated:
        return Annotated.of(batch)

    def count(self, batch: Annotated) -> dict[str, Tensor]:
        return {"tokens": (batch.labels != IGNORED_LABEL).sum()}

    def micro_batch_loss(self, batch: Annotated, totals: Mapping[str, Tensor]) -> MicroBatchLoss:
        output = self.built_network(batch.tokens, batch.document_ids, boundaries=batch.boundaries)
        labels, advantages = batch.labels.flatten(), batch.advantages.flatten()
        found = self.built_network.lm_head.token_log_probabilities(
            output.hidden.flatten(0, 1), labels, positions=batch.positions
        )
        ratios = (found.log_probabilities - batch.sampler_log_probabilities.flatten()).exp()
        clipped = ratios.clamp(1 - self.clip, 1 + self.clip)
        gains = torch.minimum(ratios * advantages, clipped * advantages) + self.entropy_factor * found.entropies
        counted = labels != IGNORED_LABEL
        loss = -gains[counted].sum() / totals["tokens"]
        shares = (ratios != clipped)[counted].sum() / totals["tokens"]
        self.metrics.record("training/largest_ratio", ratios.detach().max(), "max")
        return MicroBatchLoss(loss, {"training/clipped": shares}, output.router)
