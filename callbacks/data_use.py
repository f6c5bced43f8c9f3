"""Is the data right: the mixture asked for beside the one that was read, repetitions, and how much of a row is text."""

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.step import StepCallback, data, gather, is_due, stage
from modules.batch import MixedSources, Window


class DataUse(StepCallback):
    """Logs `data/...`.

    All shares are of rows, from the beginning of the run on, so that they settle. `data/share_asked/SOURCE` follows
    from the weights of the phases, `data/share_read/SOURCE` from the rows that were read, `data/mixture_error` is the
    largest difference of the two. `data/epochs/SOURCE` counts how often a source has been read through,
    `data/packing_use` is the share of positions that hold text, not padding, since the last point.

    Args:
        every_n_steps: Optimiser steps between points (>= 1).
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self._text: Tensor | None = None
        self._positions = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Window, batch_idx: int) -> None:
        """Count the positions with text, on the device."""
        for part in batch.micro_batches:
            self._text = part.text_positions if self._text is None else self._text + part.text_positions
            self._positions += part.tokens.numel()

    def on_step_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Log if it is due."""
        if not is_due(self.every_n_steps, trainer):
            return
        sources, step = data(trainer), trainer.global_step
        metrics: dict[str, float] = {}
        if isinstance(sources, MixedSources):
            asked, used = sources.asked(step), sources.consumed(step)
            rows = sum(source.rows for source in used.values())
            read = {name: source.rows / rows for name, source in used.items()}
            metrics |= {f"data/share_asked/{name}": share for name, share in asked.items()}
            metrics |= {f"data/share_read/{name}": share for name, share in read.items()}
            metrics["data/mixture_error"] = max(abs(asked[name] - read[name]) for name in read)
            metrics |= {f"data/epochs/{name}": source.epochs for name, source in used.items()}
        if self._text is not None:
            text, positions = map(sum, zip(*gather([float(self._text), self._positions], trainer), strict=True))
            metrics["data/packing_use"] = text / positions
            self._text, self._positions = None, 0
        stage(module).metrics.record_all(metrics)
