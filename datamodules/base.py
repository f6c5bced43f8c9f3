"""What the datamodules of all stages share: windows handed out and counted, and a part of each for every rank."""

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import LightningDataModule

from modules.batch import Progress, Window
from modules.errors import UserError


class StageData(LightningDataModule):
    """Hands out the windows of a run.

    A stage's data say how long the run is (`total`) and which windows follow (`windows`). What was handed out is
    counted here and saved: nothing else tells how far a run is.

    Args:
        sequence_length: T, the longest row.
        micro_batch_size: B of the largest micro-batch.
    """

    total: Progress
    """Length of the run."""

    def __init__(self, sequence_length: int, micro_batch_size: int) -> None:
        super().__init__()
        self.sequence_length, self.micro_batch_size = sequence_length, micro_batch_size
        self.micro_batches = 1
        """Micro-batches of the longest window of a rank."""
        self.progress = Progress()
        self.rank, self.ranks = 0, 1
        """This process among those that read different rows."""

    @property
    def order(self) -> Mapping[str, Any]:
        """What decides which rows come, and in which order, as plain JSON values; empty: unknown."""
        return {}

    @abstractmethod
    def windows(self, first: int) -> Iterator[Window]:
        """Yield this rank's windows after the first `first` steps, to the end of the run."""

    def setup(self, stage: str) -> None:
        """Find this rank's place."""
        if self.trainer is not None:
            place: dict[str, int] = self.trainer.strategy.distributed_sampler_kwargs  # type: ignore[attr-defined]
            self.rank, self.ranks = place["rank"], place["num_replicas"]

    def train_dataloader(self) -> "WindowLoader":
        """Return the loader of this rank's windows; one pass is the whole rest of the run."""
        return WindowLoader(self)

    def state_dict(self) -> dict[str, Any]:
        """Return how far the run is, the same on all ranks."""
        return {"progress": dataclasses.asdict(self.progress)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            UserError: the checkpoint is from before the data counted progress.
        """
        if "progress" not in state_dict:
            raise UserError(
                "data: the checkpoint does not say how far it is; start from it by model.init_args.init_from"
            )
        self.progress = Progress(**state_dict["progress"])


class WindowLoader:
    """Iterates the windows of a run from where it is, and counts them as they are handed out.

    Args:
        data: whose windows.
    """

    def __init__(self, data: StageData) -> None:
        self._data = data

    def __len__(self) -> int:
        """Return the optimiser steps of the whole run (a loader without length is prefetched by Lightning)."""
        return self._data.total.steps

    def __iter__(self) -> Iterator[Window]:
        """Yield the windows that are left."""
        for window in self._data.windows(self._data.progress.steps):
            self._data.progress = self._data.progress.after(window)
            yield window
