"""How a quantised model predicts held-out texts beside the original: what the report says of quality."""

import math
from collections.abc import Sequence
from typing import Any

from datamodules.progress import ProgressBar
from modules.backbone.model import Network
from modules.generation.scoring import score


def compare(
    original: Network,
    quantized: Network,
    rows: Sequence[Sequence[int]],
    token_bytes: Sequence[int] | None,
    batch_tokens: int,
) -> dict[str, Any]:
    """Score held-out texts with both networks.

    Args:
        original: the original.
        quantized: the quantised one, of the same vocabulary.
        rows: token ids of each text, two or more.
        token_bytes: UTF-8 bytes of each of the V token ids; None: not known.
        batch_tokens: tokens in one forward pass.

    Returns:
        tokens (scored: all after the first of a row); kl (original || quantised, mean, nats); top1_agreement (share);
        and under `before` and `after` nll (mean, nats), perplexity and bits_per_byte (None where not known).
    """
    kl = after = before = 0.0
    tokens = agreeing = 0
    with ProgressBar("comparing", sum(map(len, rows)), unit="tokens") as progress:
        for index, scores in score(quantized, rows, original, batch_tokens=batch_tokens):
            assert scores.kl is not None
            assert scores.reference_logprobs is not None
            assert scores.agreement is not None
            kl += float(scores.kl.double().sum())
            after -= float(scores.logprobs.double().sum())
            before -= float(scores.reference_logprobs.double().sum())
            agreeing += int(scores.agreement.sum())
            tokens += len(scores.logprobs)
            progress.advance(len(rows[index]))
    size = 0 if token_bytes is None else sum(token_bytes[token] for row in rows for token in row[1:])
    return {
        "rows": len(rows),
        "tokens": tokens,
        "kl": kl / tokens,
        "top1_agreement": agreeing / tokens,
        "before": _likelihood(before, tokens, size),
        "after": _likelihood(after, tokens, size),
    }


def _likelihood(nats: float, tokens: int, size: int) -> dict[str, float | None]:
    mean = nats / tokens
    return {
        "nll": mean,
        "perplexity": math.exp(mean),
        "bits_per_byte": nats / math.log(2) / size if size else None,
    }
