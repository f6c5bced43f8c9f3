"""The real stage on text that is bad in places."""

import torch

from modules.batch import Window
from modules.pretraining import Pretraining


class BadText(Pretraining):
    """Finds random tokens where the text of some steps was.

    Args:
        bad_steps: numbers of the steps, the first is 1.
        stage: what every stage takes.
    """

    def __init__(self, bad_steps: list[int], **stage) -> None:
        super().__init__(**stage)
        self.bad_steps = bad_steps

    def on_train_batch_start(self, window: Window, batch_idx: int) -> None:
        parts = window.micro_batches if window.step in self.bad_steps else ()
        for index, batch in enumerate(parts, start=(window.step - 1) * len(parts)):
            generator = torch.Generator().manual_seed(index + 100 * self.global_rank)
            batch.tokens.copy_(torch.randint(290, batch.tokens.shape, generator=generator))
            batch.labels[batch.labels >= 0] = 7
