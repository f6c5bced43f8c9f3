"""Reading a batch that the spike guard saved: one file per rank, tensors and plain values only."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.errors import shorten
from modules.batch import ConversationBatch, PackedBatch
from modules.errors import UserError

FIELDS = ("tokens", "labels", "document_ids")
LOSSES, WEIGHTS = "token_losses", "loss_weights"


@dataclass(frozen=True, kw_only=True)
class SavedBatch:
    """The micro-batches of one rank in a step that stood out."""

    step: int
    """Optimiser step, from 1."""
    rank: int
    reason: str
    loss: float
    gradient_norm: float
    """Gradient norm of the step, before clipping."""
    micro_batches: list[PackedBatch]
    token_losses: list[Tensor] | None
    """fp32 [B, T] of each micro-batch: nats of each position's label; None: the stage that saved it told none."""


def load(file: Path) -> SavedBatch:
    """Read a saved batch; nothing in the file is executed.

    Raises:
        UserError: the file is damaged or holds something else.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, AttributeError) as error:
        raise _refusal(file, "it is no complete file of torch.save with tensors and plain values only") from error
    try:
        micro_batches = [_micro_batch(entry) for entry in content["micro_batches"]]
        losses = [_numbers(entry, LOSSES) for entry in content["micro_batches"] if LOSSES in entry]
        saved = SavedBatch(
            step=int(content["step"]),
            rank=int(content["rank"]),
            reason=str(content["reason"]),
            loss=float(content["loss"]),
            gradient_norm=float(content["gradient_norm"]),
            micro_batches=micro_batches,
            token_losses=losses if len(losses) == len(micro_batches) else None,
        )
    except KeyError as error:
        raise _refusal(file, f"it has no {error}") from error
    except (TypeError, ValueError) as error:
        raise _refusal(file, str(error)) from error
    if len({batch.tokens.shape[1] for batch in micro_batches}) != 1:
        raise _refusal(file, "its micro-batches are of different sizes, or there is none")
    return saved


def _micro_batch(entry: dict[str, Any]) -> PackedBatch:
    """Return a micro-batch after checking that its tensors fit together.

    Raises:
        KeyError: a tensor is missing.
        UserError: one is of the wrong kind or size.
    """
    tensors = {name: entry[name] for name in FIELDS}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.is_complex():
            raise UserError(f"{name} holds no integers")
    shape = tensors["tokens"].shape
    if len(shape) != 2 or not tensors["tokens"].numel() or any(tensors[name].shape != shape for name in FIELDS):
        raise UserError(f"{', '.join(FIELDS)} are not [rows, positions] alike")
    if WEIGHTS in entry:
        return ConversationBatch(**tensors, loss_weights=_numbers(entry, WEIGHTS))
    return PackedBatch(**tensors)


def _numbers(entry: dict[str, Any], name: str) -> Tensor:
    numbers, shape = entry[name], entry["tokens"].shape
    if not isinstance(numbers, Tensor) or not numbers.is_floating_point() or numbers.shape != shape:
        raise UserError(f"{name} are not a number for each token")
    return numbers.float()


def _refusal(file: Path, reason: str) -> UserError:
    return UserError(f"--batch: {file} is no batch that the spike guard saved, or is damaged ({shorten(reason)})")
