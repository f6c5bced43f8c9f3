"""What happens when a scheduler takes the machine away: finish the step, save, leave with exit code 143.

The signal handler only notes the signal. Every rank asks at the end of each step whether any rank has got one, so that
all stop at the same step; no collective ever runs inside a handler. The question travels between the hosts (gloo), and
its answer is read a step later, so that no GPU is waited for. 143 is what a program that SIGTERM ended returns: what
comes after the run in a script must not take half a model for a whole one.
"""

import os
import signal
import sys
from types import FrameType

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer

from callbacks.checkpoint import Checkpoint
from callbacks.step import StepCallback, step_loop

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 128 + signal.SIGTERM


class Preemption(StepCallback):
    """Saves the run and ends the program when it gets SIGTERM or SIGUSR1."""

    order = 80  # all else of a step is done

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.received: str | None = None
        self._process = os.getpid()
        self._pending: tuple[torch.Tensor, dist.Work | None] | None = None
        self._previous: dict[int, object] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen from before the loader's workers start: they inherit the handler."""
        if stage == "fit":
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}

    def on_step_closed(self, trainer: Trainer, module: LightningModule) -> None:
        """Save and exit if any rank has got a signal.

        Raises:
            SystemExit: with code 143, after the checkpoint.
        """
        if self._any_rank_received(trainer) and not step_loop(trainer).is_last_step:
            path = self.checkpoint.save(trainer)
            if trainer.is_global_zero:
                why = self.received or "a signal to another process"
                print(f"stopped by {why} at step {trainer.global_step}: saved {path}", flush=True)
                print("The same command goes on from there.", flush=True)
            sys.exit(EXIT_CODE)

    def _any_rank_received(self, trainer: Trainer) -> bool:
        if trainer.world_size == 1:
            return self.received is not None
        answer = False
        if self._pending is not None:
            flag, work = self._pending
            if work is not None:
                work.wait()
            answer = bool(flag.item())
        flag = torch.tensor(int(self.received is not None))
        self._pending = flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True)
        return answer

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process:  # a loader's worker inherits the handler; its end is the main process's affair
            self.received = signal.Signals(number).name
