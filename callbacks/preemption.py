"""What happens when somebody wants the run to stop: finish the step, save, leave with exit code 130 or 143.

The signal handler only notes the signal (`callbacks/stop_request.py`). Every rank asks at the end of each step whether
any rank has got one, so that all stop at the same step; no collective ever runs inside a handler. The question travels
between the hosts (gloo), and its answer is read a step later, so that no GPU is waited for. 130 and 143 are what a
program that SIGINT or SIGTERM ended returns: what comes after the run in a script must not take half a model for a
whole one. A time limit is no signal: the run ends as one that was asked for so many steps, with exit code 0.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks.checkpoint import Checkpoint
from callbacks.step import StepCallback, step_loop
from callbacks.stop_request import STOP
from modules.errors import UserError


class Preemption(StepCallback):
    """Saves the run and ends the program when it gets SIGINT, SIGTERM or SIGUSR1.

    Args:
        checkpoint: saves.
        next_start: what goes on from there, for the last line.
    """

    order = 80  # all else of a step is done

    def __init__(self, checkpoint: Checkpoint, next_start: str = "the same command") -> None:
        self.checkpoint, self.next_start = checkpoint, next_start
        self._pending: tuple[torch.Tensor, dist.Work | None] | None = None

    def on_fetch_start(self, trainer: Trainer) -> None:
        """From the first step on there is something to save."""
        STOP.can_save = True

    def on_step_closed(self, trainer: Trainer, module: LightningModule) -> None:
        """Save and exit if any rank has got a signal.

        Raises:
            SystemExit: with code 130 or 143, after the checkpoint.
        """
        code = self._exit_code_of_any_rank(trainer)
        if code and not step_loop(trainer).is_last_step:
            path = self.checkpoint.save(trainer)
            if trainer.is_global_zero:
                why = STOP.name or "a signal to another process"
                print(f"stopped by {why} at step {trainer.global_step}: saved {path}", flush=True)
                print(f"{self.next_start[0].upper()}{self.next_start[1:]} goes on from there.", flush=True)
            # a process that the first one started must not end in an error: the first one would be killed for it
            own = isinstance(trainer.strategy.cluster_environment, LightningEnvironment)  # type: ignore[attr-defined]
            sys.exit(0 if own and not trainer.is_global_zero else code)

    def _exit_code_of_any_rank(self, trainer: Trainer) -> int:
        """Return the exit code that a rank's signal asks for, the highest of all; 0: no rank has got one."""
        if trainer.world_size == 1:
            return STOP.exit_code
        answer = 0
        if self._pending is not None:
            code, work = self._pending
            if work is not None:
                work.wait()
            answer = int(code.item())
        code = torch.tensor(STOP.exit_code)
        self._pending = code, dist.all_reduce(code, op=dist.ReduceOp.MAX, async_op=True)
        return answer


class TimeLimit(Timer):
    """`trainer.max_time`: stops the run at the end of a step once this start of the program is that old.

    Lightning's timer adds up the time of all starts: a run that is given an hour a job would never go beyond its first.

    Args:
        duration: as `trainer.max_time`.
    """

    def __init__(self, duration: Any) -> None:
        try:
            super().__init__(duration, interval="step", verbose=False)
        except (MisconfigurationException, TypeError):
            raise UserError(f"trainer.max_time: {duration} is no time; give DD:HH:MM:SS, as 00:01:30:00") from None
        if not self._duration:
            raise UserError("trainer.max_time: 0 trains nothing; give DD:HH:MM:SS, or leave it out")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the start of the program: imports and the preparation of a corpus are part of a job's time."""
        self._start_time[RunningStage.TRAINING] = STOP.started

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the next start has its own time."""
        return {}

    def _check_time_remaining(self, trainer: Trainer) -> None:
        super()._check_time_remaining(trainer)
        if trainer.should_stop and trainer.is_global_zero and self.time_elapsed() >= (self._duration or 0):
            print(f"trainer.max_time is over at step {trainer.global_step}: saving", flush=True)
