"""What drafts are worth: how many are kept, and what a draft length then gains over plain decoding.

A round of k drafts takes one catch-up of the MTP block, which gives the first draft, k - 1 further drafts and one
verification, a pass over k + 1 tokens; it yields the drafts kept and one token more. Plain decoding yields one token a
pass. So the gain of a draft length follows from the time of each part and the share of drafts kept at each position.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import mul


@dataclass(frozen=True)
class Acceptance:
    """Counts of what became of drafts."""

    kept: tuple[int, ...]
    """Verifications that kept 0, 1, ... k drafts. All that a verification kept counts, also where the completion ended
    before (with an end-of-text token, say)."""

    @classmethod
    def of(cls, accepted: Iterable[int], draft_tokens: int) -> "Acceptance":
        """Count the drafts that each verification kept (`Completion.accepted`), of `draft_tokens` = k >= 1 each."""
        counts = [0] * (draft_tokens + 1)
        for count in accepted:
            counts[count] += 1
        return cls(tuple(counts))

    @property
    def verifications(self) -> int:
        """Number of verifications."""
        return sum(self.kept)

    @property
    def length(self) -> float:
        """Mean tokens of a verification, the network's own included: 1 to k + 1; nan without any verification."""
        tokens = sum((count + 1) * number for count, number in enumerate(self.kept))
        return tokens / self.verifications if self.verifications else math.nan

    @property
    def shares(self) -> list[float]:
        """Share of the verifications that kept the draft at each position 1 to k; nan without any verification."""
        reached = self._reached()
        return [number / reached[0] if reached[0] else math.nan for number in reached[1:]]

    @property
    def rates(self) -> list[float]:
        """Share kept at each position 1 to k where all drafts before were kept; nan where that never happened."""
        reached = self._reached()
        return [now / before if before else math.nan for before, now in pairwise(reached)]

    def metrics(self) -> dict[str, float]:
        """Return `acceptance_length` and `draft_acceptance_1` ... (see `rates`), without those that are unknown."""
        values = {"acceptance_length": self.length}
        values |= {f"draft_acceptance_{place}": rate for place, rate in enumerate(self.rates, 1)}
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def lines(self) -> list[str]:
        """Return a short table for people."""
        if not self.verifications:
            return ["speculative decoding: no verification"]
        drafts = "1 draft" if len(self.kept) == 2 else f"{len(self.kept) - 1} drafts each"
        passes = "1 verification" if self.verifications == 1 else f"{self.verifications:,} verifications"
        head = f"speculative decoding: {self.length:.2f} tokens a verification ({passes} of {drafts})"
        rows = [
            f"  draft {place}: {share:6.1%} kept"
            + ("" if place == 1 or math.isnan(rate) else f", {rate:.1%} of those whose drafts before were")
            for place, (share, rate) in enumerate(zip(self.shares, self.rates, strict=True), 1)
        ]
        return [head, *rows]

    def _reached(self) -> list[int]:
        """Return how many verifications kept at least 0, 1, ... k drafts."""
        return list(accumulate(reversed(self.kept)))[::-1]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Measured times of decoding, in one unit, all for the same number of rows."""

    plain: float
    """A step of plain decoding."""
    rounds: Mapping[int, float]
    """A round of k >= 1 drafts: catch-up, drafts, verification, the choice of tokens and what is taken over; by k."""


def expected_length(rates: Sequence[float], draft_tokens: int) -> float:
    """Return the expected tokens of a round of k drafts: 1 + sum over positions j <= k of the product of rates to j.

    Args:
        rates: share kept at each position where all before were kept, see `Acceptance.rates`; at least k of them.
        draft_tokens: k.
    """
    assert len(rates) >= draft_tokens
    return 1 + sum(accumulate(rates[:draft_tokens], mul))


def predicted_gain(costs: Costs, rates: Sequence[float], draft_tokens: int) -> float:
    """Return how many times as fast as plain decoding k drafts are; for the arguments see `expected_length`."""
    return expected_length(rates, draft_tokens) * costs.plain / costs.rounds[draft_tokens]


def best_draft_tokens(costs: Costs, rates: Sequence[float]) -> int:
    """Return the draft length with the largest gain among those measured, 0 (plain decoding) if none gains."""
    gains = {k: predicted_gain(costs, rates, k) for k in costs.rounds if k <= len(rates)}
    return max((k for k in gains if gains[k] > 1), key=lambda k: gains[k], default=0)  # unknown gains (nan) are none
