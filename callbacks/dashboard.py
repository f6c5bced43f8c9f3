"""The page that TensorBoard opens on: few charts, grouped by the question they answer.

A run writes some hundred curves; a person has ten seconds. So one look at the first group must do; the others say why.
Titles name the healthy value. TensorBoard fits each axis to its curve, which makes a mountain of the difference between
0.1% and 0.2%: the constant curves `scale/0` and `scale/1` keep charts in proportion, as a line or as the borders of a
coloured band. TensorBoard draws a band only while all three curves have the same steps: hence one interval for them,
and the flush.

Charts name their curves by patterns, not by layer or source, so that the layout is the same for every run: TensorBoard
shows it once for all.
"""

from lightning.pytorch import LightningModule, Trainer

from callbacks.step import StepCallback, is_due, stage

ZERO, ONE = "scale/0", "scale/1"
BAND = [ZERO, ONE]
LAYOUT: dict[str, dict[str, list[str]]] = {
    "Is the run healthy?": {
        "Loss, training and held-out": ["training/next_token_loss", "validation/loss"],
        "Gradient norm": ["training/gradient_norm", ZERO],
        "Skipped steps (healthy: 0)": ["training/skipped_steps", ZERO],
        "Busiest expert over the mean, worst layer (even: 1)": ["experts/load_max_over_mean/worst", ONE],
        "Dead experts, share in the worst layer (healthy: 0)": ["experts/dead_fraction/worst", ZERO],
        "MFU, share of the peak": ["speed/mfu", *BAND],
        "Waiting for data, share of a step (healthy: 0)": ["speed/data_wait_share", *BAND],
        "Mixture: asked minus read, largest (healthy: 0)": ["data/mixture_error", *BAND],
    },
    "Is it learning?": {
        "Held-out bits per byte": ["validation/bits_per_byte"],
        "Loss of each MTP depth": ["training/mtp_loss_.*"],
        "Drafts kept, at each position where all before were": ["validation/draft_acceptance_.*", ONE],
        "Learning rate": ["training/learning_rate"],
        "Steps skipped, by reason (healthy: 0)": ["training/skipped_(not_finite|loss_spikes|gradient_spikes)", ZERO],
        "Loss and gradient norm, sigmas above their window": ["training/(loss|gradient)_sigmas", ZERO],
    },
    "Is it fast?": {
        "Tokens per second": ["training/tokens_per_second", ZERO],
        "Seconds of a step by part": ["speed/seconds/.*"],
        "Memory in GiB": ["memory/.*", ZERO],
        "Validation, sampling, checkpoints: share of all time": ["speed/pause_share", *BAND],
    },
    "Are the experts healthy?": {
        "Variation of the load, worst layer (even: 0)": ["experts/load_variation/worst", ZERO],
        "Router entropy, worst layer (undecided: 1, collapsed: 0)": ["experts/router_entropy/worst", ZERO],
        "Spread of the router bias, worst layer": ["experts/bias_spread/worst", ZERO],
    },
    "Is training in few bits healthy?": {
        "Underflow by operand, share in the worst module": ["quantization/underflow/.*/worst", ZERO],
        "Saturation by operand, share in the worst module (healthy: next to 0)": [
            "quantization/saturation/.*/worst",
            ZERO,
        ],
        "Signal to quantisation noise by operand in dB, worst module (NVFP4: 17 to 20)": [
            "quantization/snr_db/.*/worst"
        ],
        "Weight gradients that are exactly zero, share": ["gradients/zero_share/(all|worst)", ZERO],
        "Weights without any gradient (healthy: 0)": ["gradients/dead_weights", ZERO],
        "Decayed channels, share in the worst module (healthy: 0)": ["weights/decayed_channels/worst", ZERO],
    },
    "Is the data right?": {
        "Mixture: share of rows asked for and read": ["data/share_(asked|read)/.*", ZERO],
        "Epochs of each source": ["data/epochs/.*", ZERO],
        "Packing: share of positions with text (full: 1)": ["data/packing_use", *BAND],
    },
    "Layer by layer": {
        "Residual stream behind each layer, RMS": ["residual/rms/.*"],
        "Busiest expert over the mean (even: 1)": ["experts/load_max_over_mean/(layer|mtp)_.*"],
        "Dead experts, share (healthy: 0)": ["experts/dead_fraction/(layer|mtp)_.*"],
        "Router entropy (undecided: 1, collapsed: 0)": ["experts/router_entropy/(layer|mtp)_.*"],
        "Spread of the router bias": ["experts/bias_spread/(layer|mtp)_.*"],
        "Underflow of the inputs, forward pass": [r"quantization/underflow/fprop\.x/(layer|mtp)_.*", ZERO],
        "Underflow of the gradients, for those of the inputs": [
            r"quantization/underflow/dgrad\.g/(layer|mtp)_.*",
            ZERO,
        ],
        "Weight gradients that are exactly zero, by module": ["gradients/zero_share/(layer|mtp)_.*", ZERO],
        "Decayed channels, share (healthy: 0)": ["weights/decayed_channels/(layer|mtp)_.*", ZERO],
    },
}
"""Question -> chart -> patterns of the curves in it, or one curve and its band (TensorBoard shows those last)."""


class Dashboard(StepCallback):
    """Writes the layout, `scale/...`, and all that others record.

    Args:
        every_n_steps: Optimiser steps between points of the constant curves (>= 1).
    """

    order = 60  # after all who record, before a checkpoint: no curve may be older than it

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the layout, and what a validation before the first step has found."""
        if trainer.is_global_zero and trainer.logger is not None:
            trainer.logger.experiment.add_custom_scalars(custom_scalars())  # type: ignore[attr-defined]
        stage(pl_module).write_metrics()

    def on_step_closed(self, trainer: Trainer, module: LightningModule) -> None:
        """Write, and let TensorBoard see everything up to here whenever the constant curves are due."""
        due = is_due(self.every_n_steps, trainer)
        if due:
            stage(module).metrics.record_all({ZERO: 0.0, ONE: 1.0})
        stage(module).write_metrics()
        for logger in trainer.loggers if due else ():
            logger.save()


def custom_scalars() -> dict[str, dict[str, list[object]]]:
    """Return the layout as `SummaryWriter.add_custom_scalars` takes it; each pattern fits whole names only."""
    return {question: {chart: _chart(tags) for chart, tags in charts.items()} for question, charts in LAYOUT.items()}


def _chart(tags: list[str]) -> list[object]:
    if tags[1:] == BAND:
        return ["Margin", tags]
    return ["Multiline", [f"{tag}$" for tag in tags]]
