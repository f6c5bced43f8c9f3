"""Objectives of the chunked head: each token's loss, and its gradient in the logits, of a chunk of tokens.

They are written down with their gradients because that takes a few lines and a third of autograd's memory, and lets
cross-entropy work in one buffer. See `Objective` in modules/ops/chunked_head.py: `head(hidden, cross_entropy, ...)`.
Distillation: `head(hidden, against(forward_kl, teacher_head), teacher_hidden=..., ...)`, or `top_k_kl` with what a
cache holds.
Logits are finite, the teacher's too: a vocabulary that is masked with -inf has no divergence here.
Shapes: C tokens of a chunk, V vocabulary, K entries of a cache, D hidden of the teacher.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.ops.chunked_head import IDENTITY, LogitTransform, Objective

Scored = tuple[dict[str, Tensor], Tensor]
"""(`loss`, fp32 [C], by name; the gradient of its sum in the logits, fp32 [C, V])."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Scored:
    """Compute -log q(label), of fp32 [C, V], which is overwritten, and int64 [C]."""
    targets = labels.unsqueeze(-1)
    largest, chosen = logits.amax(-1), logits.gather(1, targets).squeeze(-1)
    probabilities = torch.softmax(logits, -1, out=logits)
    # log sum exp = largest logit - log of its probability, which is no less than 1 / V: one pass over exp.
    nats = largest - probabilities.amax(-1).log() - chosen
    gradient = probabilities.scatter_add_(1, targets, probabilities.new_full(targets.shape, -1.0))
    return {"loss": nats}, gradient


def against(
    divergence: Callable[..., Scored],
    teacher_head: Callable[[Tensor], Tensor],
    transform: LogitTransform = IDENTITY,
) -> Objective:
    """Return the objective of a divergence from a teacher, whose logits are computed chunk by chunk too.

    Args:
        divergence: takes the logits of student and teacher, fp32 [C, V].
        teacher_head: maps hidden states [C, D] to new fp32 logits [C, V], see `ShardedStrategy.lend`.
        transform: of the teacher's logits.

    Returns:
        An objective with the per-token inputs `teacher_hidden` [N, D], computed now or read from a cache, and
        optionally `labels`, which only say what counts.
    """

    def objective(logits: Tensor, teacher_hidden: Tensor, labels: Tensor | None = None) -> Scored:
        teacher_logits = teacher_head(teacher_hidden)
        transform.apply_(teacher_logits)
        return divergence(logits, teacher_logits)

    return objective


def forward_kl(logits: Tensor, teacher_logits: Tensor) -> Scored:
    """Compute KL(p || q) of teacher p and student q."""
    log_p, log_q = teacher_logits.log_softmax(-1), logits.log_softmax(-1)
    p = log_p.exp()
    loss = (p * (log_p - log_q)).sum(-1)
    return {"loss": loss}, log_q.exp_() - p


def reverse_kl(logits: Tensor, teacher_logits: Tensor) -> Scored:
    """Compute KL(q || p) of student q and teacher p."""
    log_p, log_q = teacher_logits.log_softmax(-1), logits.log_softmax(-1)
    difference, q = log_q - log_p, log_q.exp()
    loss = (q * difference).sum(-1)
    return {"loss": loss}, q * (difference - loss.unsqueeze(-1))


def jensen_shannon(logits: Tensor, teacher_logits: Tensor) -> Scored:
    """Compute (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2; no more than log 2."""
    log_p, log_q = teacher_logits.log_softmax(-1), logits.log_softmax(-1)
    difference, p, q = log_q - log_p, log_p.exp(), log_q.exp()
    log_p_to_m, log_q_to_m = (math.log(2) - F.softplus(signed) for signed in (difference, -difference))
    from_student = (q * log_q_to_m).sum(-1)
    loss = ((p * log_p_to_m).sum(-1) + from_student) / 2
    return {"loss": loss}, q * (log_q_to_m - from_student.unsqueeze(-1)) / 2


def mean_squared_error(logits: Tensor, teacher_logits: Tensor) -> Scored:
    """Compute the mean over the vocabulary of the squared difference of the logits."""
    difference = logits - teacher_logits
    return {"loss": difference.square().mean(-1)}, difference * (2 / logits.shape[-1])


def top_k_kl(
    logits: Tensor, teacher_log_probabilities: Tensor, teacher_ids: Tensor, labels: Tensor | None = None
) -> Scored:
    """Compute KL(p || q) over K tokens of the teacher's and, as one more outcome, all others together.

    Args:
        logits: fp32 [C, V], overwritten.
        teacher_log_probabilities: [C, K] of the tokens, normalised over the whole vocabulary.
        teacher_ids: int64 [C, K], distinct; K < V.
        labels: only say what counts.
    """
    log_p, log_q = teacher_log_probabilities.float(), logits.log_softmax(-1)
    p, chosen = log_p.exp(), log_q.gather(1, teacher_ids)
    rest = (1 - p.sum(-1, keepdim=True)).clamp(min=0)
    log_others = log_q.scatter(1, teacher_ids, -math.inf)
    log_rest = log_others.logsumexp(-1, keepdim=True)
    loss = (p * (log_p - chosen)).sum(-1) + (torch.xlogy(rest, rest) - rest * log_rest).squeeze(-1)
    gradient = log_q.exp_() - rest * (log_others - log_rest).exp_()
    return {"loss": loss}, gradient.scatter_add_(1, teacher_ids, -p)
