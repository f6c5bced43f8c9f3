"""TensorBoard events in the run folder itself, with optimiser steps on the x axis.

Lightning's logger counts micro-steps from zero (validation after step 100 lands at 99), makes folders of its own and
writes a file of hyper-parameters. A resumed run must also tell TensorBoard to forget what a killed one wrote after its
last checkpoint, or curves run back on themselves.
"""

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from app.run_folder import RunFolder
from callbacks.step import StepCallback
from modules.checkpoints.folder import step_of, sync
from modules.errors import writing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class RunStart(StepCallback):
    """Makes the run's folder when training starts: until then a configuration may be refused, and leave nothing.

    Args:
        folder: the run's folder, locked.
        config: the resolved configuration.
        checkpoint: what the run goes on from; None: it begins.
    """

    def __init__(self, folder: RunFolder, config: str, checkpoint: Path | None) -> None:
        self.folder, self.config, self.checkpoint = folder, config, checkpoint

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the configuration; move checkpoints out of the way that are later than where the run goes on."""
        self.folder.clean()
        step = 0 if self.checkpoint is None else step_of(self.checkpoint)
        if (place := self.folder.set_aside_after(step)) is not None:
            print(f"later checkpoints of the run are kept in {place}; delete it when you need them no more", flush=True)
        self.folder.save_config(self.config)


class RunLogger(Logger):
    """Writes scalars and texts of a run.

    Args:
        folder: run folder.
        resumed_step: optimiser steps of the checkpoint that the run goes on from; later points are forgotten. 0: all.
    """

    def __init__(self, folder: Path, resumed_step: int) -> None:
        super().__init__()
        self._folder = folder
        # Points at a step >= purge_step are forgotten; a run from the start keeps none, not even those at step 0.
        self._writer = _Writer(folder, purge_step=resumed_step + 1 if resumed_step else 0)
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
        """The writer, for texts and pictures."""
        return cast("SummaryWriter", self._writer)

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
        if self._writer.is_open:
            self.experiment.flush()

    @rank_zero_only
    def sync(self) -> None:
        """Bring all points to the disk, so that no checkpoint is newer than the curves."""
        self.save()
        for file in self._writer.files():
            sync(file)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file; a later point opens another."""
        if self._writer.is_open:
            self.sync()
            self.experiment.close()


class _Writer:
    """A SummaryWriter that is made at its first use, and whose errors name the folder.

    Lightning looks at a logger's writer before anything is checked. And TensorBoard writes in a thread: an error there
    is raised at the next use, without a name.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        self._folder, self._purge_step = folder, purge_step
        self._known: set[Path] = set()
        self.is_open = False

    def files(self) -> set[Path]:
        """Return the files that this writer has made."""
        return set(self._folder.glob("events.out.tfevents.*")) - self._known if self.is_open else set()

    @functools.cached_property
    def _writer(self) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter

        self._known = set(self._folder.glob("events.out.tfevents.*"))
        threading.excepthook = _without_full_disk(threading.excepthook)
        writer = SummaryWriter(log_dir=str(self._folder), purge_step=self._purge_step, max_queue=1000)
        self.is_open = True
        return writer

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with writing(self._folder):
                return getattr(self._writer, name)(*args, **kwargs)

        return call


def _without_full_disk(hook: Callable[[Any], object]) -> Callable[[Any], object]:
    """Return a hook for errors in threads that leaves those alone which are raised again where the writer is used."""
    return lambda failure: None if isinstance(failure.exc_value, OSError) else hook(failure)
