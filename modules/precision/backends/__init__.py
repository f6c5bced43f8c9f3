"""What computes quantised products, and how one is chosen."""

from collections.abc import Iterable
from typing import Literal

import torch

from modules.errors import UserError
from modules.precision.backends.emulated import Emulated
from modules.precision.backends.torchao import TorchAO
from modules.precision.backends.transformer_engine import TransformerEngine
from modules.precision.scheme import Arithmetic, Backend, Products

BackendName = Literal["auto", "emulated", "transformer_engine", "torchao"]
EMULATED = Emulated()
BACKENDS: tuple[Backend, ...] = (TransformerEngine(), TorchAO(), EMULATED)
"""The best first; the last refuses nothing."""


def choose(
    name: BackendName,
    module: str,
    periods: Iterable[Products],
    arithmetic: Arithmetic,
    shape: torch.Size,
    device_type: str,
    capability: tuple[int, int] | None = None,
) -> tuple[Backend, dict[str, str]]:
    """Return the backend of a module, and why it is not one of the better ones, by name.

    Args:
        name: what the run file says.
        module: full name of the module, for messages.
        periods: formats of its products, one after the other.
        arithmetic: of the network.
        shape: of its weight.
        device_type: where it will be, cpu or cuda.
        capability: see `Backend.refusal`.

    Raises:
        UserError: the backend that is asked for cannot compute it here.
    """
    quantized = [products for products in periods if not products.plain]
    refused: dict[str, str] = {}
    for backend in BACKENDS:
        if name not in ("auto", backend.name):
            continue
        reasons = (backend.refusal(products, arithmetic, shape, device_type, capability) for products in quantized)
        reason = next(filter(None, reasons), "")
        if not reason:
            return backend, refused
        if name == backend.name:
            raise UserError(
                f"model.precision.backend: {name} cannot compute {module} in {quantized[0].fprop} "
                f"{'there' if capability else 'here'}: {reason}; "
                "take auto or emulated"
            )
        refused[backend.name] = reason
    raise AssertionError("the last backend refuses nothing")
