"""What scored rows say together: likelihood, perplexity, bits per byte, divergence."""

import math
from collections.abc import Iterable, Sequence
from typing import Any


def summarise(rows: Iterable[dict[str, Any]], token_bytes: Sequence[int] | None) -> dict[str, Any]:
    """Return the figures of scored rows.

    A row's completion counts where it has one, else all of its tokens after the first. Means are over tokens, not over
    rows.

    Args:
        rows: with token_ids, logprobs and, where they have them, completion_start and kl.
        token_bytes: UTF-8 bytes of each of the V token ids; None: not known.

    Returns:
        rows, tokens; and of those tokens nll (mean, nats), perplexity, bits_per_byte (all bits over the bytes of the
        scored tokens) and kl (mean, nats); None where there is nothing to divide by.
    """
    count, tokens, size, nll = 0, 0, 0, 0.0
    divergences: list[float] = []
    for row in rows:
        start = max((row.get("completion_start") or 1) - 1, 0)
        scored = row["logprobs"][start:]
        count += 1
        tokens += len(scored)
        nll -= math.fsum(scored)
        if token_bytes is not None:
            size += sum(token_bytes[index] for index in row["token_ids"][start + 1 :])
        if "kl" in row:
            divergences.append(math.fsum(row["kl"][start:]))
    mean = nll / tokens if tokens else None
    return {
        "rows": count,
        "tokens": tokens,
        "nll": mean,
        "perplexity": None if mean is None else math.exp(mean),
        "bits_per_byte": nll / math.log(2) / size if size else None,
        "kl": math.fsum(divergences) / tokens if divergences and tokens else None,
    }


def describe(summary: dict[str, Any]) -> str:
    """Return the figures as one line."""
    parts = [f"{summary['rows']:,} rows, {summary['tokens']:,} tokens scored"]
    if summary["nll"] is not None:
        parts += [f"mean nll {summary['nll']:.4f} nats", f"perplexity {summary['perplexity']:.4f}"]
    if summary["bits_per_byte"] is not None:
        parts.append(f"bits per byte {summary['bits_per_byte']:.4f}")
    if summary["kl"] is not None:
        parts.append(f"mean KL {summary['kl']:.6f} nats")
    return ", ".join(parts)
