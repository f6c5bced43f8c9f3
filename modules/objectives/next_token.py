"""Losses of given text: next token, multi-token prediction, and the sequence auxiliary loss of the router.

What a target counts is decided by weights, with which each part of the loss is a weighted mean over the targets of the
whole step: all 1 for text; those of `conversation_weights` for conversations.

Shapes: B rows, T positions, N = B x T x (1 + M) head inputs, M MTP depths, E experts, K top-k.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from modules.backbone.model import Network, Output
from modules.backbone.router import Routing
from modules.batch import IGNORED_LABEL, ConversationBatch, PackedBatch, shifted_labels
from modules.objectives.per_token import cross_entropy

LossAverage = Literal["tokens", "conversations"]


class NextTokenLoss(NamedTuple):
    """Loss of one micro-batch."""

    loss: Tensor
    """fp32 scalar, differentiable: this micro-batch's share of the weighted mean over all targets of the step."""
    nats: Tensor
    """fp32 [1 + M], detached: sum of weight x cross-entropy of the next token and of each MTP depth."""
    token_nats: Tensor
    """fp32 [B, T], detached: cross-entropy of the next token at each position; 0 where there is no label."""
    output: Output


def target_weights(batch: PackedBatch, mtp_depths: int) -> Tensor:
    """Return fp32 [1 + M, B, T]: 1 where the next token, or that of an MTP depth, is a target, else 0."""
    depths = range(mtp_depths + 1)
    labels = torch.stack([shifted_labels(batch.labels, batch.document_ids, depth) for depth in depths])
    return (labels != IGNORED_LABEL).float()


def conversation_weights(batch: ConversationBatch, mtp_depths: int, average: LossAverage) -> Tensor:
    """Return what each target counts in a mean over tokens, or in a mean over conversations of their means.

    A conversation is a document of a row. An MTP depth averages over the targets that it has: those of a conversation
    are fewer than the next token's, since a target beyond its end is none.

    Args:
        batch: one micro-batch.
        mtp_depths: M.
        average: "tokens": a target counts what its conversation weighs; "conversations": all targets of a conversation
            together do.

    Returns:
        fp32 [1 + M, B, T], 0 where there is no target.
    """
    ids = batch.document_ids
    weights = torch.stack([shifted_labels(batch.loss_weights, ids, depth, 0) for depth in range(mtp_depths + 1)])
    if average == "tokens":
        return weights
    targets, places = target_weights(batch, mtp_depths), ids.long().expand(weights.shape)
    counts = targets.new_zeros(*targets.shape[:2], targets.shape[2] + 1).scatter_add_(2, places, targets)
    return weights / counts.gather(2, places).clamp(min=1)


def loss_weights(weights: Tensor, totals: Tensor, mtp_loss_factor: float) -> Tensor:
    """Return with which weight the nats of each target enter the loss of the step.

    L = L_0 + (mtp_loss_factor / M) sum_k L_k, each part a weighted mean over its targets in the whole step (Nemotron 3
    Super, section 2.1.2, and Megatron's `process_mtp_loss`).

    Args:
        weights: [1 + M, B, T], what each target counts; 0 where there is none.
        totals: [1 + M], their sums over the whole step, all micro-batches and ranks.
        mtp_loss_factor: weight of the MTP losses together.

    Returns:
        fp32 [1 + M, B, T].
    """
    scales = totals.new_full(totals.shape, mtp_loss_factor / max(len(totals) - 1, 1), dtype=torch.float32)
    scales[0] = 1.0
    return weights * (scales / divisors(totals)).view(-1, 1, 1)


def divisors(totals: Tensor) -> Tensor:
    """Return what sums over targets are divided by: their totals, or 1 where there is no target."""
    return torch.where(totals > 0, totals, 1)


def next_token_loss(
    network: Network,
    batch: PackedBatch,
    totals: Tensor,
    mtp_depths: int,
    mtp_loss_factor: float,
    weights: Tensor | None = None,
) -> NextTokenLoss:
    """Compute the loss of next token and MTP, see `loss_weights`.

    Args:
        network: the network.
        batch: one micro-batch; its `positions`, where known, are for these MTP depths.
        totals: [1 + M], sums of the weights over the whole step, all micro-batches and ranks.
        mtp_depths: M.
        mtp_loss_factor: weight of the MTP losses together.
        weights: [1 + M, B, T], what each target counts; None: 1.

    Returns:
        `NextTokenLoss`; the losses of all micro-batches and ranks add up to the step's loss.
    """
    output = network(batch.tokens, batch.document_ids, mtp_depths, batch.boundaries)
    hidden = torch.cat([output.hidden, *output.mtp_hidden]).flatten(0, 1)
    labels = torch.cat([shifted_labels(batch.labels, batch.document_ids, depth) for depth in range(mtp_depths + 1)])
    if weights is None:
        weights = target_weights(batch, mtp_depths)
    loss, results = network.lm_head(
        hidden,
        cross_entropy,
        positions=batch.positions,
        token_weights=loss_weights(weights, totals, mtp_loss_factor).flatten(),
        labels=labels.flatten(),
    )
    nats = results["loss"].view_as(weights)
    return NextTokenLoss(loss, (weights * nats).flatten(1).sum(1), nats[0], output)


def sequence_auxiliary_loss(router: list[Routing]) -> Tensor:
    """Compute the sequence-wise balance loss of DeepSeek-V3 (arXiv 2412.19437, eq. 17-20), without its coefficient.

    Per row and layer: sum_i f_i P_i with f_i = E x (share of the row's choices that went to expert i) and P_i = mean
    over positions of the normalised score of expert i; 1 when the load is even.

    Args:
        router: one `Routing` per mixture layer; at least one.

    Returns:
        fp32 scalar, differentiable: sum over rows and layers.
    """
    losses = []
    for routing in router:
        counts = routing.counts.float()
        share = counts / counts.sum(-1, keepdim=True) * counts.shape[-1]
        losses.append((share * routing.probabilities.mean(1)).sum())
    return torch.stack(losses).sum()
