"""TensorBoard events in the run folder itself, with optimiser steps on the x axis.

Lightning's logger counts micro-steps from zero (validation after step 100 lands at 99), makes folders of its own and
writes a file of hyper-parameters. A resumed run must also tell TensorBoard to forget what a killed one wrote after its
last checkpoint, or curves run back on themselves.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from modules.checkpoints.folder import sync

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class RunLogger(Logger):
    """Writes scalars and texts of a run.

    Args:
        folder: run folder.
        resumed_step: optimiser steps of the checkpoint that the run goes on from; later points are forgotten. 0: all.
    """

    def __init__(self, folder: Path, resumed_step: int) -> None:
        super().__init__()
        self._folder = folder
        self._resumed_step = resumed_step
        self._writer: SummaryWriter | None = None
        self._known: set[Path] = set()
        self.trainer: Trainer | None = None

    @property
    def name(self) -> str:
        """Name of the run."""
        return self._folder.name

    @property
    def version(self) -> str:
        """Nothing: a run folder holds one run."""
        return ""

    @property
    def save_dir(self) -> str:
        """Run folder."""
        return str(self._folder)

    @property
    @rank_zero_experiment
    def experiment(self) -> "SummaryWriter":
        """The writer, for texts and pictures; made at the first use."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._known = set(self._folder.glob("events.out.tfevents.*"))
            # Points at a step >= purge_step are forgotten; a run from the start keeps none, not even those at step 0.
            purge = self._resumed_step + 1 if self._resumed_step else 0
            self._writer = SummaryWriter(log_dir=str(self._folder), purge_step=purge, max_queue=1000)
        return self._writer

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write scalars at the number of optimiser steps done, whatever Lightning's own count says."""
        assert self.trainer is not None
        for name, value in metrics.items():
            if name != "epoch":  # always 0: the whole run is one epoch
                self.experiment.add_scalar(name, value, self.trainer.global_step)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Write nothing: `config.yaml` in the run folder says it all."""

    @rank_zero_only
    def save(self) -> None:
        """Hand all points to the operating system: they survive a kill of the program."""
        if self._writer is not None:
            try:
                self._writer.flush()
            except OSError as error:
                raise OSError(error.errno, error.strerror or str(error), self.save_dir) from error

    @rank_zero_only
    def sync(self) -> None:
        """Bring all points to the disk, so that no checkpoint is newer than the curves."""
        self.save()
        if self._writer is not None:
            for file in set(self._folder.glob("events.out.tfevents.*")) - self._known:
                sync(file)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file; a later point opens another."""
        if self._writer is not None:
            self.sync()
            self._writer.close()
