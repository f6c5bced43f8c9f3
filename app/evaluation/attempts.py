"""What attempts at the problems of an environment say: accuracy, pass@k, and how sure that is."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from datamodules.environments.pool import Pool
from modules.batch import Attempt, Problem

SHOWN = 24
"""Characters of the most frequent answer that a table shows."""


class Estimate(NamedTuple):
    """A mean and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.1%} ± {self.error:.1%}"


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of independent values, one a problem, and its standard error (nan below two)."""
    if not values:
        return Estimate(math.nan, math.nan)
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Estimate(mean, math.nan)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Estimate(mean, math.sqrt(variance / len(values)))


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the unbiased estimate that at least one of k samples is right (Chen et al. 2021, arXiv 2107.03374, eq. 1).

    Args:
        samples: n samples of a problem, n >= k.
        right: how many of them are right.
        k: samples that may be looked at.
    """
    assert samples >= k
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def most_frequent(pool: Pool, name: str, problems: Sequence[Problem]) -> tuple[str, Estimate]:
    """Return the most frequent answer to problems, and what always giving it is worth."""
    answer, _ = Counter(problem.answer for problem in problems).most_common(1)[0]
    found = pool.judge(name, [(problem, answer) for problem in problems])
    return answer, estimate([judgement.reward for judgement in found if judgement.failure is None])


def figures(problems: Sequence[Sequence[Attempt]], samples: int) -> dict[str, Any]:
    """Return what attempts at the problems of an environment say.

    An attempt that could not be judged counts as none; a problem counts for pass@k where k of its were.

    Returns:
        `accuracy` (pass@1) and `pass@K` for K = 1, 2, 4, ... and all samples, as `Estimate`; numbers of `problems`,
        `samples`, `failures` and `cut` replies, and each kind of `failure` with its number.
    """
    rewards = [[a.judgement.reward for a in attempts if a.judgement.failure is None] for attempts in problems]
    ks = sorted({samples, *(2**power for power in range(samples.bit_length()))})
    attempts = [attempt for part in problems for attempt in part]
    kinds = Counter(a.judgement.failure for a in attempts if a.judgement.failure is not None)
    return {
        "accuracy": estimate([sum(part) / len(part) for part in rewards if part]),
        **{
            f"pass@{k}": estimate([pass_at_k(len(part), part.count(1.0), k) for part in rewards if len(part) >= k])
            for k in ks
        },
        "problems": len(problems),
        "samples": len(attempts),
        "failures": kinds.total(),
        "cut": sum(not attempt.ended for attempt in attempts),
        "failure": dict(kinds.most_common()),
    }


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean of independent estimates."""
    error = math.sqrt(sum(part.error**2 for part in estimates)) / len(estimates)
    return Estimate(sum(part.value for part in estimates) / len(estimates), error)


def table(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines that a person reads: figures ± one standard error, the mean, and what was not judged."""
    first = next(iter(found.values()))
    columns = [key for key, value in first.items() if isinstance(value, Estimate) and key != "pass@1"]
    titles = {"most_frequent": "most frequent answer"}
    rows = [["environment", "problems", *(titles.get(key, key) for key in columns), "cut", "not judged"]]
    for name, one in found.items():
        cells = [str(one[key]) for key in columns]
        answer = one["most_frequent_answer"]
        cells[columns.index("most_frequent")] += f" ({answer if len(answer) <= SHOWN else answer[:SHOWN] + '...'!r})"
        rows.append([name, f"{one['problems']:,}", *cells, f"{one['cut']:,}", f"{one['failures']:,}"])
    if len(found) > 1:
        means = [str(mean_of([one[key] for one in found.values()])) for key in columns]
        totals = [f"{sum(one[key] for one in found.values()):,}" for key in ("problems", "cut", "failures")]
        rows.append(["mean", totals[0], *means, *totals[1:]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    failures = [
        f"note: {name}: {count:,} not judged: {kind}"
        for name, one in found.items()
        for kind, count in list(one["failure"].items())[:3]
    ]
    return [*lines, *failures]


def details(name: str, problems: Sequence[Sequence[Attempt]]) -> list[dict[str, Any]]:
    """Return a row for each attempt, as plain JSON values."""
    return [
        {
            "environment": name,
            "problem": number,
            "sample": sample,
            "messages": [*attempt.problem.messages, *attempt.dialogue],
            "reply": attempt.reply,
            "answer": attempt.problem.answer,
            "reward": attempt.judgement.reward,
            "reason": attempt.judgement.reason,
            "failure": attempt.judgement.failure,
            "ended": attempt.ended,
        }
        for number, attempts in enumerate(problems)
        for sample, attempt in enumerate(attempts)
    ]
