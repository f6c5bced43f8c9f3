"""Quantised products by NVIDIA's Transformer Engine (2.9 or later), whose arithmetic the emulated backend repeats.

FP8 (per tensor, current scaling, gradients in E5M2) from compute capability 8.9, MXFP8 and NVFP4 from 10.0. Its modules
compute with our weights, which take the place of their own for the call. Its random numbers are its own: a resumed run
does not draw the same. It runs on NVIDIA GPUs only, and this project has not run it: tests hold what it is asked for
against a stand-in, no more.
"""

import functools
import importlib
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from modules.ops.experts import padded_places
from modules.ops.kernels import uncompiled
from modules.precision.devices import format_refusal
from modules.precision.formats import Format
from modules.precision.scheme import Arithmetic, Products, Scheme

_MULTIPLE: dict[Format, int] = {"fp8": 16, "mxfp8": 32, "nvfp4": 32}
"""What every size of a product is divisible by; rows (of each expert) are filled up with zeros."""


class TransformerEngine:
    """The backend."""

    name = "transformer_engine"
    shows_operands = False

    def __init__(self) -> None:
        self._modules: WeakKeyDictionary[Scheme, nn.Module] = WeakKeyDictionary()

    def refusal(
        self,
        products: Products,
        arithmetic: Arithmetic,
        shape: torch.Size,
        device_type: str,
        capability: tuple[int, int] | None = None,
    ) -> str:
        """See `Backend`."""
        chosen = products.fprop
        if device_type != "cuda" or (capability is None and not torch.cuda.is_available()):
            return "no CUDA device"
        if products != Products.all_in(chosen):
            return "it computes all three products of a module in one format"
        if failure := format_refusal(chosen, capability) if capability else _failure(chosen):
            return failure
        if any(size % _MULTIPLE[chosen] for size in shape[-2:]):
            return f"{chosen} needs sizes that are multiples of {_MULTIPLE[chosen]}, not {list(shape[-2:])}"
        return ""

    @uncompiled
    def linear(self, x: Tensor, weight: Tensor, scheme: Scheme) -> Tensor:
        """See `Backend`."""
        rows = x.flatten(0, -2)
        padded = F.pad(rows, (0, 0, 0, -len(rows) % _MULTIPLE[scheme.products.fprop]))
        out = self._run(scheme, weight, {"weight": weight}, padded)
        return out[: len(rows)].reshape(*x.shape[:-1], len(weight)).clone()

    @uncompiled
    def grouped_linear(self, x: Tensor, weight: Tensor, offsets: Tensor, scheme: Scheme) -> Tensor:
        """See `Backend`; reads the numbers of rows on the host, as its module asks for them."""
        places, ends = padded_places(len(x), offsets, _MULTIPLE[scheme.products.fprop])
        rows = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        padded = x.new_zeros(sum(rows), x.shape[1]).index_copy(0, places, x)
        weights = {f"weight{expert}": matrix for expert, matrix in enumerate(weight.unbind())}
        return self._run(scheme, weight, weights, padded, rows).index_select(0, places)

    def _run(self, scheme: Scheme, weight: Tensor, weights: dict[str, Tensor], *inputs: Any) -> Tensor:
        """Run its module for these weights, in the recipe of the scheme."""
        engine = _load("pytorch")
        if scheme not in self._modules:
            kind = engine.Linear if weight.ndim == 2 else functools.partial(engine.GroupedLinear, len(weight))
            sizes = weight.shape[-1], weight.shape[-2]
            self._modules[scheme] = kind(*sizes, bias=False, params_dtype=weight.dtype, device="meta")
        with engine.autocast(enabled=True, recipe=_recipe(scheme)):
            return functional_call(self._modules[scheme], weights, inputs)


def _load(module: str) -> Any:
    return importlib.import_module(f"transformer_engine.{module}")


@functools.cache
def _failure(chosen: Format) -> str:
    """Return why it does not compute in a format here, or an empty text."""
    try:
        _, reason = getattr(_load("pytorch"), f"is_{chosen}_available")(return_reason=True)
    except Exception as error:  # of a foreign import: a reason, never an error
        return f"{type(error).__name__}: {error}"
    return reason


def _recipe(scheme: Scheme) -> Any:
    recipes, arithmetic = _load("common.recipe"), scheme.arithmetic
    if scheme.products.fprop == "fp8":
        return recipes.Float8CurrentScaling()
    if scheme.products.fprop == "mxfp8":
        return recipes.MXFP8BlockScaling()
    return recipes.NVFP4BlockScaling(
        disable_rht=not arithmetic.hadamard,
        disable_stochastic_rounding=not arithmetic.stochastic_rounding,
        disable_2d_quantization=not arithmetic.two_dimensional_weights,
    )
