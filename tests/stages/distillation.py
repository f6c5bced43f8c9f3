"""Reverse KL against a frozen teacher that is sharded on its own: a stage as a user would write one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modules.backbone.initialization import initialize
from modules.backbone.model import Network
from modules.base import MicroBatchLoss, StageModule
from modules.batch import PackedBatch
from modules.objectives.per_token import against, reverse_kl
from tests.stages.data import Annotated


class Distillation(StageModule):
    """Learn from another network of the same shape.

    Args:
        teacher_seed: seed of the teacher's weights.
        stage: what every stage takes.
    """

    def __init__(self, teacher_seed: int = 7, **stage: Any) -> None:
        super().__init__(**stage)
        self.teacher_seed = teacher_seed
        self._teacher: list[Network] = []  # a list: it is no part of the checkpoint

    def configure_model(self) -> None:
        super().configure_model()
        if not self._teacher:
            teacher = self.lay_out(self.build_network(self.device.type))
            initialize(teacher, self.teacher_seed)
            self._teacher.append(teacher.requires_grad_(False).eval())

    def add_fields(self, batch: PackedBatch) -> Annotated:
        return Annotated.of(batch)

    def count(self, batch: Annotated) -> dict[str, Tensor]:
        return {"weight": batch.weights[batch.labels >= 0].sum()}

    def micro_batch_loss(self, batch: Annotated, totals: Mapping[str, Tensor]) -> MicroBatchLoss:
        (teacher,) = self._teacher
        output = self.built_network(batch.tokens, batch.document_ids, boundaries=batch.boundaries)
        with torch.no_grad():
            teacher_hidden = teacher(batch.tokens, batch.document_ids, boundaries=batch.boundaries).hidden
        inputs = {"labels": batch.labels.flatten(), "teacher_hidden": teacher_hidden.flatten(0, 1)}
        inputs["token_weights"] = batch.weights.flatten() / totals["weight"]
        with self.strategy.lend(teacher.lm_head) as teacher_head:
            objective = against(reverse_kl, teacher_head)
            head = self.built_network.lm_head
            loss, results = head(output.hidden.flatten(0, 1), objective, positions=batch.positions, **inputs)
        self.metrics.record("training/largest_divergence", results["loss"].max(), "max")
        return MicroBatchLoss(loss, {"training/reverse_kl": loss.detach()}, output.router)
