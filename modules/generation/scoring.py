"""Log-probabilities of given tokens, in batches of rows of unequal length and with flat memory.

Rows of similar length share a forward pass, padded on the right: the network is causal, so padding can influence
nothing. A row longer than a batch goes through piece by piece with a cache. Logits [N, V] are formed for a few hundred
positions at a time, never for a batch, because they are the largest tensor by far (64k tokens of a vocabulary of 131k
would be 34 GB).

Shapes: B rows, T positions, N positions of all rows, D hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modules.backbone.model import Network
from modules.errors import UserError
from modules.generation.runner import Runner
from modules.ops import native

BATCH_TOKENS = 8192
"""Positions in a forward pass unless others are asked for: enough to keep a CPU or a GPU busy."""


class Scores(NamedTuple):
    """What a network says of the n tokens of a row; on the CPU, one entry for each token after the first."""

    logprobs: Tensor
    """fp32 [n - 1]: natural log of the probability of the token given those before it."""
    greedy: Tensor
    """bool [n - 1]: whether the token is the most likely one."""
    kl: Tensor | None = None
    """fp32 [n - 1]: KL(reference || network) of the distributions over the vocabulary, in nats; None: no reference.
    Rounding can make a zero slightly negative."""
    reference_logprobs: Tensor | None = None
    """fp32 [n - 1]: `logprobs` of the reference."""
    agreement: Tensor | None = None
    """bool [n - 1]: whether the most likely token is the reference's."""


def score(
    network: Network, rows: Sequence[Sequence[int]], reference: Network | None = None, batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[int, Scores]]:
    """Score rows of tokens.

    Args:
        network: the network, in evaluation mode.
        rows: token ids of each row; one of fewer than two tokens has no scores.
        reference: network of the same vocabulary to compare the distributions with; None: none.
        batch_tokens: positions in a forward pass, padding included; longer rows go through in pieces of this.

    Yields:
        Number of the row and its scores, the longest rows first.

    Raises:
        UserError: a log-probability is not finite.
    """
    networks = [network] if reference is None else [network, reference]
    for batch in batches([len(row) - 1 for row in rows], batch_tokens):
        scored = _score_batch(networks, [rows[index] for index in batch], batch_tokens)
        yield from zip(batch, scored, strict=True)


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the numbers of rows that go together, the longest first: rows times longest within `batch_tokens`.

    Args:
        lengths: positions of each row.
        batch_tokens: most positions of a batch, padding included; a longer row is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        size = max(batch_tokens // max(lengths[order[0]], 1), 1)
        yield order[:size]
        order = order[size:]


@torch.no_grad()
def _score_batch(networks: list[Network], rows: list[Sequence[int]], batch_tokens: int) -> list[Scores]:
    """Return the scores of rows that fit one batch, the longest row first, or of one longer row."""
    counts = [max(len(row) - 1, 0) for row in rows]
    device, length = networks[0].backbone.embeddings.weight.device, counts[0]
    tokens = torch.tensor([[*row, *[0] * (length + 1 - len(row))] for row in rows], device=device)
    valid = torch.arange(length, device=device) < torch.tensor(counts, device=device)[:, None]
    numbers, flags = torch.empty(0), torch.empty(0, dtype=torch.bool)
    nothing = [numbers, flags] if len(networks) == 1 else [numbers, flags, numbers, numbers, flags]
    # Several rows are one piece and one row is one column: either way the positions come row by row.
    parts = [nothing, *_score_pieces(networks, tokens, valid, batch_tokens)]
    columns = [torch.cat(column).split(counts) for column in zip(*parts, strict=True)]
    if not all(bool(row.isfinite().all()) for row in columns[0]):
        raise UserError(
            "a log-probability is not finite: weights are damaged, or too large for the dtype; try --dtype fp32"
        )
    return [Scores(*row) for row in zip(*columns, strict=True)]


def _score_pieces(networks: list[Network], tokens: Tensor, valid: Tensor, batch_tokens: int) -> Iterator[list[Tensor]]:
    """Run the networks over pieces of `batch_tokens` columns; yield the fields of `Scores` for some positions.

    Args:
        networks: the network, and the reference if there is one.
        tokens: int64 [B, T + 1].
        valid: bool [B, T]: the positions that a token follows; one row if T is more than a piece.
        batch_tokens: columns of a piece.
    """
    length, split = valid.shape[1], networks[0].split_for_logits
    runners = [Runner(network, 1, length) if length > batch_tokens else None for network in networks]
    for start in range(0, length, batch_tokens):
        piece = slice(start, min(start + batch_tokens, length))
        part = tokens[:, piece]
        hidden = [
            split((network(part).hidden if runner is None else runner.run(part))[valid[:, piece]])
            for network, runner in zip(networks, runners, strict=True)
        ]
        targets = split(tokens[:, piece.start + 1 : piece.stop + 1][valid[:, piece]])
        for chunk in zip(targets, *hidden, strict=True):
            yield _score_positions(networks, *chunk)


def _score_positions(networks: list[Network], targets: Tensor, *hidden: Tensor) -> list[Tensor]:
    """Return the fields of `Scores` for n positions.

    Args:
        networks: the network, and the reference if there is one.
        targets: int64 [n]: the tokens that came.
        hidden: of each network, [n, D].
    """
    ours, *others = (network.logits(states).log_softmax(-1) for network, states in zip(networks, hidden, strict=True))
    best = native.largest(ours)
    fields = [_pick(ours, targets), best == targets]
    for other in others:
        fields += [(other.exp() * (other - ours)).sum(-1), _pick(other, targets), best == native.largest(other)]
    return [values.cpu() for values in fields]


def _pick(logprobs: Tensor, targets: Tensor) -> Tensor:
    """Return the entries [n] of [n, V] at the targets."""
    return logprobs.gather(-1, targets[:, None]).squeeze(-1)
