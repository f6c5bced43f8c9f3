"""What computes quantised products, and how one is chosen."""

from typing import Literal

import torch

from modules.precision.backends.emulated import Emulated
from modules.precision.scheme import Backend, Products

BackendName = Literal["auto", "emulated", "transformer_engine", "torchao"]
EMULATED = Emulated()
BACKENDS: tuple[Backend, ...] = (EMULATED,)
"""The best first."""


def missing(formats: list[str], device_type: str) -> list[str]:
    """Return a line for each backend that computes some of these formats only slowly or not at all, with the reason."""
    lines = []
    for backend in BACKENDS[:-1]:
        reasons = {backend.refusal(Products(*[chosen] * 3), torch.Size((256, 256)), device_type) for chosen in formats}
        lines += [f"{backend.name} not used: {reason}" for reason in sorted(reasons - {""})]
    return lines


def choose(name: BackendName, module: str, products: Products, shape: torch.Size, device_type: str) -> Backend:
    """Return the backend of a module.

    Args:
        name: what the run file says.
        module: full name of the module, for messages.
        products: formats of its products.
        shape: of its weight.
        device_type: where it will be, cpu or cuda.

    Raises:
        ValueError: the backend that is asked for cannot compute it here.
    """
    for backend in BACKENDS:
        if name not in ("auto", backend.name):
            continue
        reason = backend.refusal(products, shape, device_type)
        if not reason:
            return backend
        if name == backend.name:
            raise ValueError(
                f"model.precision.backend: {name} cannot compute {module} in {products.fprop} here: {reason}; "
                "take auto or emulated"
            )
    raise AssertionError("the emulated backend refuses nothing")
