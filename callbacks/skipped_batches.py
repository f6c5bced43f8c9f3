"""The batches of skipped steps, kept for a person to look at: most spikes are a few lines of strange text.

Whether a step was skipped is known on the device only; asking at each step would make the host wait. So the
windows of the steps since the last logging point are held (token ids and losses, small beside activations), and the
skipped ones are written when the curves are. They are written before a checkpoint too: a resumed run does not see them
again.

runs/<name>/spikes/step=00000123.pt            one device
runs/<name>/spikes/step=00000123-rank=1.pt     several: each writes its own micro-batches
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.step import StepCallback, stage
from callbacks.text import fold
from modules.batch import PackedBatch, Window
from modules.errors import UserError, writing
from modules.optim.spikes import REASONS

FOLDER = "spikes"


class _Step(NamedTuple):
    window: Window
    token_losses: list[Tensor | None]
    reason: Tensor
    values: Tensor
    scores: Tensor


class SkippedBatches(StepCallback):
    """Writes the batches of skipped steps, and says on the console which were skipped and why.

    A file is loaded by `torch.load(file, weights_only=True)`: `step`, `rank`, `reason` ("not_finite", "loss_spike" or
    "gradient_spike"), `loss`, `gradient_norm` (of the whole step, before clipping) and `micro_batches`, a list with the
    fields of each `PackedBatch` and, where the stage tells them, `token_losses`, fp32 [B, T]: those of the step itself,
    kept from its forward pass, as later weights, or other random numbers of rounding, would give others.

    Args:
        keep_last: Number of skipped steps whose batches are kept (>= 1); older ones are deleted.
    """

    def __init__(self, keep_last: int = 20) -> None:
        if keep_last < 1:
            raise UserError(f"skipped_batches.keep_last is {keep_last}: at least one must be kept")
        self.keep_last = keep_last
        self._steps: list[_Step] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Window, batch_idx: int
    ) -> None:
        """Hold the window; write what was skipped at the logging interval, before the module may stop the run."""
        module, guard = stage(pl_module), stage(pl_module).step_guard
        self._steps.append(_Step(batch, module.token_losses, guard.reason, guard.values, guard.scores))
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._write(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write what was skipped before the checkpoint."""
        self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was skipped in the last steps."""
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        steps, self._steps = self._steps, []
        if not steps:
            return
        reasons = torch.stack([step.reason for step in steps]).tolist()
        for step, reason in zip(steps, reasons, strict=True):
            if reason:
                self._save(trainer, step, REASONS[reason])

    def _save(self, trainer: Trainer, step: _Step, reason: str) -> None:
        folder = Path(trainer.default_root_dir) / FOLDER
        several = trainer.world_size > 1
        end = f"-rank={trainer.global_rank}.pt" if several else ".pt"
        loss, norm = step.values.tolist()
        number = step.window.step
        content = {
            "step": number,
            "rank": trainer.global_rank,
            "reason": reason,
            "loss": loss,
            "gradient_norm": norm,
            "micro_batches": [
                {name: tensor.cpu().clone() for name, tensor in tensors.items()}
                for tensors in map(_tensors, step.window.micro_batches, step.token_losses)
            ],
        }
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step={number:08d}{end}"
        _write_file(path, content)
        for old in _newest_first(folder, end)[self.keep_last :]:
            old.unlink()
        if trainer.is_global_zero:
            shown = folder / f"step={number:08d}-rank=*.pt" if several else path
            print(fold(skip_line(number, reason, (loss, norm), step.scores.tolist())), flush=True)
            print(f"  its batch: {shown}", flush=True)


def _tensors(batch: PackedBatch, token_losses: Tensor | None) -> dict[str, Tensor]:
    return batch.tensors() | ({} if token_losses is None else {"token_losses": token_losses})


def skip_line(step: int, reason: str, values: Sequence[float], scores: Sequence[float]) -> str:
    """Return the console line of a skipped step.

    Args:
        step: number of the step.
        reason: one of `REASONS`.
        values: loss and gradient norm.
        scores: standard deviations by which these lie above the steps before.
    """
    parts = [f"loss {values[0]:.4g}", f"gradient norm {values[1]:.4g}"]
    if reason != "not_finite":
        parts = [f"{part} ({score:+.1f} sigma)" for part, score in zip(parts, scores, strict=True)]
    return f"step {step} skipped, {reason.replace('_', ' ')}: {', '.join(parts)}"


def _write_file(path: Path, content: dict[str, Any]) -> None:
    data = io.BytesIO()  # torch's own file writer hides why it could not write
    torch.save(content, data)
    partial = path.with_suffix(".partial")
    try:
        with writing(path):
            partial.write_bytes(data.getbuffer())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _newest_first(folder: Path, end: str) -> list[Path]:
    """Return this rank's files by the time they were written: a run may have gone back to an earlier step."""
    files = [path for path in folder.glob(f"step=*{end}") if ("-rank=" in path.name) == ("-rank=" in end)]
    return sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True)
