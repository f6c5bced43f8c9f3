"""Supervised fine-tuning: next token and MTP over packed conversations, on what an assistant says."""

from typing import Any, cast

import torch
from torch import Tensor

from modules.backbone.model import Network
from modules.batch import ChatTokens, ConversationBatch, PackedBatch
from modules.checkpoints.source import open_model
from modules.checkpoints.unlearnt import find_unlearnt, start_anew
from modules.errors import UserError
from modules.language_modeling import LanguageModeling
from modules.objectives.next_token import LossAverage, conversation_weights


class SFT(LanguageModeling):
    """Fine-tune a network on packed conversations.

    Args:
        loss_average: what the loss of a step is a mean over, all its micro-batches and devices together. tokens: the
            supervised tokens, each with the weight of its conversation; conversations: the conversations, by their
            weights, of the mean over each one's supervised tokens, so that short answers count as much as long ones.
        freeze_router: keep the routers of the mixtures as they are, weights and biases.
        language_modeling: what `LanguageModeling` takes.

    Raises:
        UserError: if a value is out of range, or values contradict each other.
    """

    def __init__(
        self,
        loss_average: LossAverage = "tokens",
        freeze_router: bool = False,
        **language_modeling: Any,
    ) -> None:
        super().__init__(**language_modeling)
        if freeze_router and self.expert_bias_rate:
            raise UserError(
                f"model.expert_bias_rate: {self.expert_bias_rate} would move the biases of frozen routers "
                "(model.freeze_router); set it to 0"
            )
        self.loss_average: LossAverage = loss_average
        self.freeze_router = freeze_router

    def build_network(self, device_type: str = "cpu", capability: tuple[int, int] | None = None) -> Network:
        """Return a new network, see `StageModule`, its routers frozen where that is asked for."""
        network = super().build_network(device_type, capability)
        if self.freeze_router:
            for router in network.routers():
                router.requires_grad_(False)
        return network

    def configure_model(self) -> None:
        """Build the network, see `StageModule`; rows of chat tokens that `init_from` never learnt start anew."""
        built = self.network is not None
        super().configure_model()
        if built or self.init_from is None or not isinstance(self.data, ChatTokens):
            return
        source, tokens = open_model(self.init_from), self.data.chat_tokens()
        reserved = [*self.data.reserved_tokens(), *range(self.data.vocab_size, self.backbone_config.vocab_size)]
        found = find_unlearnt(source, tokens, reserved)
        if self.lora is None:
            start_anew(self.built_network, source, tokens, reserved, found, self.seed)
        what = "start anew" if self.lora is None else "stay so under adapters (train whole first: lora null)"
        for name, names in found.items():
            line = f"rows of {name} that were never learnt {what}: {' '.join(names)}"
            self.initial_weights.append(line)

    def add_fields(self, batch: PackedBatch) -> ConversationBatch:
        """Take each row for a conversation of weight 1."""
        return ConversationBatch(**vars(batch), loss_weights=torch.ones_like(batch.tokens, dtype=torch.float32))

    def target_weights(self, batch: PackedBatch, mtp_depths: int) -> Tensor:
        """Return fp32 [1 + mtp_depths, B, T], what each target counts, see `conversation_weights`."""
        return conversation_weights(cast(ConversationBatch, batch), mtp_depths, self.loss_average)
