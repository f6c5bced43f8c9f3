"""The learning rate as a function of tokens: warm-up, stable, minus-sqrt decay (WSD; Nemotron 3 Super section 2.4)."""

import math
from dataclasses import dataclass

from modules.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """WSD in tokens. The decay ends with the run.

    Raises:
        UserError: if a field is out of range.
    """

    warmup_tokens: int = 0
    """Tokens over which the learning rate rises linearly from 0; >= 0."""
    decay_tokens: int = 0
    """Tokens of the final decay; >= 0 (0: no decay)."""
    minimum_ratio: float = 0.01
    """Learning rate at the end of the decay, as a share of the peak; in [0, 1]."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for key in ("warmup_tokens", "decay_tokens"):
            if getattr(self, key) < 0:
                raise UserError(f"model.schedule.{key}: {getattr(self, key)} must not be negative")
        if not 0 <= self.minimum_ratio <= 1:
            raise UserError(f"model.schedule.minimum_ratio: {self.minimum_ratio} must lie in [0, 1]")

    def check_length(self, total_tokens: int) -> None:
        """Check that warm-up and decay fit into the run.

        Raises:
            UserError: if they do not.
        """
        if self.warmup_tokens + self.decay_tokens > total_tokens:
            raise UserError(
                f"model.schedule: warmup_tokens + decay_tokens ({self.warmup_tokens + self.decay_tokens:,}) exceed "
                f"the run's data.total_tokens ({total_tokens:,}); shorten them or lengthen the run"
            )

    def factor(self, tokens: int, total_tokens: int) -> float:
        """Return the learning rate after `tokens` of `total_tokens`, as a share of the peak.

        min + (1 - min)(1 - sqrt(t / decay_tokens)) at t tokens into the decay.
        """
        if tokens < self.warmup_tokens:
            return tokens / self.warmup_tokens
        into_decay = tokens - (total_tokens - self.decay_tokens)
        if self.decay_tokens == 0 or into_decay <= 0:
            return 1.0
        left = 1 - math.sqrt(min(into_decay / self.decay_tokens, 1.0))
        return self.minimum_ratio + (1 - self.minimum_ratio) * left
