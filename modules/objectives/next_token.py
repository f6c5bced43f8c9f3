"""Pretraining losses: next token, multi-token prediction, and the sequence auxiliary loss of the router.

Shapes: B rows, T positions, N = B x T x (1 + M) head inputs, M MTP depths, E experts, K top-k.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from modules.backbone.model import Network, Output
from modules.backbone.router import Routing
from modules.batch import PackedBatch, shifted_labels
from modules.objectives.per_token import cross_entropy


class NextTokenLoss(NamedTuple):
    """Loss of one micro-batch."""

    loss: Tensor
    """fp32 scalar, differentiable: this micro-batch's share of the weighted mean over all targets of the step."""
    nats: Tensor
    """fp32 [1 + M], detached: summed cross-entropy of the next token and of each MTP depth."""
    token_nats: Tensor
    """fp32 [B, T], detached: cross-entropy of the next token at each position; 0 where there is no label."""
    output: Output


def next_token_loss(
    network: Network, batch: PackedBatch, counts: Tensor, mtp_depths: int, mtp_loss_factor: float
) -> NextTokenLoss:
    """Compute L = L_0 + (mtp_loss_factor / M) sum_k L_k, each part a mean over its targets in the whole step.

    Source: Nemotron 3 Super section 2.1.2 and Megatron's `process_mtp_loss`.

    Args:
        network: the network.
        batch: one micro-batch; its `positions`, where known, are for these MTP depths.
        counts: [1 + M], targets of each part in the whole step, over all micro-batches and ranks.
        mtp_depths: M.
        mtp_loss_factor: weight of the MTP losses together.

    Returns:
        `NextTokenLoss`; the losses of all micro-batches and ranks add up to the step's loss.
    """
    output = network(batch.tokens, batch.document_ids, mtp_depths, batch.boundaries)
    hidden = torch.cat([output.hidden, *output.mtp_hidden]).flatten(0, 1)
    labels = torch.cat([shifted_labels(batch.labels, batch.document_ids, depth) for depth in range(mtp_depths + 1)])
    scales = torch.full((mtp_depths + 1,), mtp_loss_factor / max(mtp_depths, 1), device=hidden.device)
    scales[0] = 1.0
    scales = scales / counts.clamp(min=1)
    token_weights = scales.repeat_interleave(batch.tokens.numel())
    loss, results = network.lm_head(
        hidden, cross_entropy, positions=batch.positions, token_weights=token_weights, labels=labels.flatten()
    )
    nats = results["loss"].view(mtp_depths + 1, *batch.tokens.shape)
    return NextTokenLoss(loss, nats.flatten(1).sum(1), nats[0], output)


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
