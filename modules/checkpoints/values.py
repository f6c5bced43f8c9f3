"""Checks on the values of a tensor that comes from a file."""

from pathlib import Path

from torch import Tensor

from modules.errors import UserError


def check_finite(tensor: Tensor, name: str, file: Path) -> None:
    """Raise a ValueError that names tensor and file if any value is NaN or infinite."""
    if tensor.numel() == 0:
        return
    lowest, highest = tensor.aminmax()  # both are NaN if any value is; no copy of the tensor is made
    if not (lowest.isfinite() and highest.isfinite()):
        bad = int((~tensor.isfinite()).sum())
        raise UserError(
            f"{file}: tensor {name} holds {bad} values of {tensor.numel()} that are NaN or infinite; the model was "
            "saved broken: take another checkpoint of it"
        )
