"""The page that TensorBoard opens on: few charts, grouped by the question they answer.

A run writes some hundred curves; a person has ten seconds. Titles say what a healthy value is. Charts name their curves
by patterns, not by layer or source, so that the layout is the same for every run: TensorBoard shows it once for all.
"""

from lightning.pytorch import Callback, LightningModule, Trainer

LAYOUT: dict[str, dict[str, list[str]]] = {
    "Is the run healthy?": {
        "Loss, training and held-out": ["training/next_token_loss", "validation/loss"],
        "Gradient norm": ["training/gradient_norm"],
        "MFU, share of the peak": ["speed/mfu"],
        "Waiting for data, share of a step (healthy: near 0)": ["speed/data_wait_share"],
        "Busiest expert over the mean, worst layer (even: 1)": ["experts/load_max_over_mean/worst"],
        "Dead experts, share in the worst layer (healthy: 0)": ["experts/dead_fraction/worst"],
    },
    "Is it learning?": {
        "Held-out bits per byte": ["validation/bits_per_byte"],
        "Loss of each MTP depth": ["training/mtp_loss_.*"],
        "Learning rate": ["training/learning_rate"],
    },
    "Is it fast?": {
        "Tokens per second": ["training/tokens_per_second"],
        "Seconds of a step by part": ["speed/seconds/.*"],
        "Validation, sampling, checkpoints: share of all time": ["speed/pause_share"],
        "Memory in GiB": ["memory/.*"],
    },
    "Are the experts healthy?": {
        "Variation of the load, worst layer (even: 0)": ["experts/load_variation/worst"],
        "Router entropy, worst layer (undecided: 1, collapsed: 0)": ["experts/router_entropy/worst"],
        "Spread of the router bias, worst layer": ["experts/bias_spread/worst"],
    },
    "Is the data right?": {
        "Mixture: share of rows asked for and read": ["data/share_(asked|read)/.*"],
        "Mixture: largest difference (healthy: near 0)": ["data/mixture_error"],
        "Epochs of each source": ["data/epochs/.*"],
        "Packing: share of positions with text (full: 1)": ["data/packing_use"],
    },
    "Are the numbers sound?": {
        "Skipped steps (healthy: 0)": ["training/skipped_steps"],
        "Residual stream behind each layer, RMS": ["residual/rms/.*"],
    },
    "Which layer?": {
        "Busiest expert over the mean (even: 1)": ["experts/load_max_over_mean/(layer|mtp)_.*"],
        "Dead experts, share (healthy: 0)": ["experts/dead_fraction/(layer|mtp)_.*"],
        "Router entropy (undecided: 1, collapsed: 0)": ["experts/router_entropy/(layer|mtp)_.*"],
        "Spread of the router bias": ["experts/bias_spread/(layer|mtp)_.*"],
    },
}
"""Question -> chart -> patterns of the curves in it."""


class Dashboard(Callback):
    """Writes the layout when a run starts."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it."""
        if trainer.is_global_zero and trainer.logger is not None:
            trainer.logger.experiment.add_custom_scalars(custom_scalars())  # type: ignore[attr-defined]


def custom_scalars() -> dict[str, dict[str, list[object]]]:
    """Return the layout as `SummaryWriter.add_custom_scalars` takes it; each pattern fits whole names only."""
    return {
        question: {chart: ["Multiline", [f"{pattern}$" for pattern in patterns]] for chart, patterns in charts.items()}
        for question, charts in LAYOUT.items()
    }
