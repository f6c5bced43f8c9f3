"""Which steps are skipped: those that are not finite, and spikes, which leap out of the steps before them.

One bad batch late in a long run can undo days of it, and not taking its step costs nothing. A spike lies so many
standard deviations above the mean of a window of steps (the rule of OLMo's SkipStepOptimizer, 6 sigma over 128 steps).
Unlike there, skipped steps stay out of the window: a burst of bad batches must not raise the bar for those that follow.
So a level that has really risen is skipped over and over, until `model.max_skipped_steps` stops the run.
Everything is computed on the device, from values that are equal on all ranks: no rank waits, none decides alone.
Shapes: W steps of the window; 2 is loss, gradient norm.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modules.errors import UserError

REASONS = ("none", "not_finite", "loss_spike", "gradient_spike")
"""Why a step was skipped, by `StepGuard.reason`."""
LEAST_SIGMA = 1e-3
"""Least standard deviation, as a share of the mean: the rounding of a constant loss is no spike."""


@dataclass(frozen=True, kw_only=True)
class SpikeGuardConfig:
    """What counts as a spike.

    Raises:
        UserError: if a field is out of range.
    """

    sigmas: float = 6.0
    """Standard deviations above the mean of the window from which a loss or gradient norm is a spike; > 0."""
    window: int = 128
    """Steps in the window, the newest that were not skipped; >= 2."""
    minimum_steps: int = 64
    """Steps the window must hold before anything is called a spike; from 2 to `window`."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.sigmas < math.inf:
            raise UserError(
                f"model.spike_guard.sigmas: {self.sigmas} must be positive and finite; model.spike_guard: null "
                "switches the guard off"
            )
        if self.window < 2:
            raise UserError(f"model.spike_guard.window: {self.window} must be at least 2")
        if not 2 <= self.minimum_steps <= self.window:
            raise UserError(
                f"model.spike_guard.minimum_steps: {self.minimum_steps} must lie between 2 and model.spike_guard."
                f"window ({self.window})"
            )


class StepGuard(nn.Module):
    """Decides for each step whether it is skipped, and counts.

    Its state is no part of the module's `state_dict`, whose tensors must be those of the architecture: a run can change
    the guard, or go on from a checkpoint that knows none (`saved_state`, `restore`).

    Args:
        config: what a spike is; None: only steps that are not finite are skipped.
    """

    history: Tensor
    """fp64 [2, W]: loss and gradient norm of the newest steps that were not skipped, the newest last; NaN: no step."""
    spikes: Tensor
    """int64 [2]: steps of the run that were skipped as spikes of the loss, of the gradient."""
    streak_spikes: Tensor
    """int64 [2]: the same of the present streak of skipped steps; zeros after a step that was taken."""
    reason: Tensor
    """int64 scalar: place in `REASONS` for the last step."""
    values: Tensor
    """fp64 [2]: loss and gradient norm of the last step."""
    scores: Tensor
    """fp64 [2]: standard deviations by which the last step lay above the window's mean; 0 while it is too short."""

    def __init__(self, config: SpikeGuardConfig | None) -> None:
        super().__init__()
        self.config = config
        window = 0 if config is None else config.window
        for name, value in (
            ("history", torch.full((2, window), math.nan, dtype=torch.float64)),
            ("spikes", torch.zeros(2, dtype=torch.int64)),
            ("streak_spikes", torch.zeros(2, dtype=torch.int64)),
            ("reason", torch.zeros((), dtype=torch.int64)),
            ("values", torch.zeros(2, dtype=torch.float64)),
            ("scores", torch.zeros(2, dtype=torch.float64)),
        ):
            self.register_buffer(name, value, persistent=False)

    @torch.no_grad()
    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Judge a step and remember it.

        Args:
            loss: scalar, of all ranks.
            norm: scalar, gradient norm of all ranks before clipping.

        Returns:
            bool scalar: whether to skip the step.
        """
        self.values = values = torch.stack([loss, norm]).double()
        finite = values.isfinite().all()
        spikes = torch.zeros(2, dtype=torch.bool, device=values.device)
        if self.config is not None:
            self.scores = deviations(self.history, values, self.config.minimum_steps)
            above = (self.scores > self.config.sigmas) & finite
            spikes = torch.stack([above[0], above[1] & ~above[0]])  # one reason a step, so that the counts add up
        skip = ~finite | spikes.any()
        self.reason = ~finite * 1 + spikes[0] * 2 + spikes[1] * 3
        self.spikes += spikes
        self.streak_spikes.copy_(torch.where(skip, self.streak_spikes + spikes, 0))
        shifted = torch.cat([self.history, values.unsqueeze(1)], dim=1)[:, 1:]
        self.history.copy_(torch.where(skip, self.history, shifted))
        return skip

    def metrics(self, skipped_steps: Tensor) -> dict[str, Tensor]:
        """Return the counts of skipped steps by reason, and the scores of the last step, by TensorBoard name.

        Args:
            skipped_steps: int64 scalar, skipped steps of the run.
        """
        if self.config is None:
            return {}
        spikes = self.spikes.clone()
        return {
            "training/skipped_not_finite": skipped_steps - spikes.sum(),
            "training/skipped_loss_spikes": spikes[0],
            "training/skipped_gradient_spikes": spikes[1],
            "training/loss_sigmas": self.scores[0],
            "training/gradient_sigmas": self.scores[1],
        }

    def saved_state(self) -> dict[str, Tensor]:
        """Return copies of what a checkpoint keeps: of the window, the steps that it holds."""
        held = self.history[:, self.history[0].isfinite()]
        state = {"history": held, "spikes": self.spikes, "streak_spikes": self.streak_spikes}
        return {name: value.clone().cpu() for name, value in state.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; a window of another length takes the newest steps that both have room for."""
        for name in ("spikes", "streak_spikes"):
            getattr(self, name).copy_(state[name])
        ours, theirs = self.history, state["history"]
        kept = min(ours.shape[1], theirs.shape[1])
        ours.fill_(math.nan)
        ours[:, ours.shape[1] - kept :] = theirs[:, theirs.shape[1] - kept :]

    def streak_message(self, step: int, streak: int, limit: int) -> str:
        """Return why a run is stopped after `streak` skipped steps up to `step`; waits for the device."""
        loss, gradient = self.streak_spikes.tolist()
        steps = f"in steps {step - streak + 1} to {step} (model.max_skipped_steps {limit})"
        if self.config is None or loss + gradient == 0:
            return (
                f"loss or gradient not finite {steps}; lower model.optimizer.learning_rate or look at the data of "
                "these steps"
            )
        return (
            f"nothing but skipped steps {steps}: {loss} loss spikes and {gradient} gradient spikes above "
            f"{self.config.sigmas:g} sigma, {streak - loss - gradient} not finite; if the level may rise, raise "
            "model.spike_guard.sigmas or set model.spike_guard to null, otherwise lower model.optimizer.learning_rate "
            "or look at the data of these steps"
        )


def deviations(history: Tensor, values: Tensor, minimum_steps: int) -> Tensor:
    """Return how many standard deviations values lie above the means of their histories.

    The standard deviation is that of the sample, at least `LEAST_SIGMA` of the mean.

    Args:
        history: fp64 [2, W]; NaN where there is no step.
        values: fp64 [2].
        minimum_steps: steps a history must hold.

    Returns:
        fp64 [2]; 0 where the history is shorter.
    """
    steps = history.isfinite().sum(1)
    mean = history.nansum(1) / steps
    variance = (history - mean.unsqueeze(1)).square().nansum(1) / (steps - 1)
    sigma = torch.maximum(variance.sqrt(), LEAST_SIGMA * mean.abs())
    return torch.where(steps >= minimum_steps, (values - mean) / sigma, 0.0)
