"""A network from a MODEL: built on the meta device, filled tensor by tensor, so that the peak is model plus one tensor.

What is fp32 always (norms, router, A_log, D, dt_bias, convolution) is so in memory whatever the file holds. Quantised
weights are run as they are served (`modules.precision.quantized_product`, in bf16 memory), or loaded dequantised where
a dtype is asked for.
"""

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn

from modules.backbone.attention import Attention
from modules.backbone.config import BackboneConfig
from modules.backbone.initialization import local_part, local_rows
from modules.backbone.model import Network
from modules.checkpoints.adapted import AdaptedSource
from modules.checkpoints.names import EMBEDDING, HEAD, public_names
from modules.checkpoints.source import ModelFolder, open_model
from modules.errors import UserError
from modules.precision import quantized_product
from modules.precision.formats import Format
from modules.precision.linear import FormattedModule, GroupedLinear, Linear
from modules.precision.lora import adapters, attach
from modules.precision.scheme import PlainProduct

DTYPES: dict[str, Format | None] = {"auto": None, "fp32": "fp32", "bf16": "bf16"}


@dataclass(frozen=True)
class Model:
    """A network and where it came from."""

    network: Network
    """In eval mode, without gradients."""
    source: ModelFolder
    note: str | None
    """How a quantised MODEL runs, in a line; None: it is not quantised."""


def load_model(path: Path | str, dtype: str = "auto", device: torch.device | str = "cpu", merge: bool = False) -> Model:
    """Load a MODEL for inference.

    Args:
        path: see `open_model`.
        dtype: format of matrix products and of the weights they read: `auto` takes each tensor's own (bf16 in bf16,
            quantised as it is served, all else in fp32), or fp32, or bf16, quantised weights dequantised.
        device: where the network lives.
        merge: of adapters, whether the weights are those with their differences added; else they stay beside those of
            their base, as they were trained.

    Raises:
        UserError: the folder is no MODEL or damaged, the dtype is unknown, or weights cannot be served as they are
            quantised.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r} must be one of {', '.join(DTYPES)}")
    source = open_model(Path(path))
    adapted = source if isinstance(source, AdaptedSource) and not merge else None
    weights = source if adapted is None else adapted.base
    with torch.device("meta"):
        network = Network(source.config)
        if adapted is not None:
            attach(network, adapted.lora)
    quantized = quantized_names(weights, source.config) if dtype == "auto" else {}
    _set_formats(network, weights, DTYPES[dtype], quantized)
    network.to_empty(device=device)
    network.tie_weights()
    network.eval().requires_grad_(False)
    load_weights(network, weights, leave=quantized)
    for parameter, names in quantized.items():
        quantized_product.install(_owner(network, parameter), map(weights.read_quantized, names))
    if weights.quantization is not None and dtype == "auto":
        for name, module in network.named_modules():
            if isinstance(module, Attention):
                module.kv_scales = weights.quantization.kv_scales.get(name)
    if adapted is not None:
        for name, adapter in adapters(network):
            for matrix, values in adapted.read_adapter(name).items():
                adapter.get_parameter(matrix).copy_(values)
    note = None if weights.quantization is None else _describe(network, weights, quantized, dtype)
    return Model(network, source, note)


@torch.no_grad()
def load_weights(network: Network, source: ModelFolder, leave: Container[str] = ()) -> None:
    """Fill a network with the tensors of a MODEL, in the network's own dtypes; a rank reads only what it holds.

    Args:
        network: materialised, sharded along dimension 0 or not.
        source: the MODEL; holds all tensors of the network (it may have an MTP block more).
        leave: parameters to leave as they are.

    Raises:
        UserError: a tensor cannot be read or holds values that are not finite.
    """
    state = network.state_dict()
    for name, place in public_names(network.config).items():
        if place.parameter in leave:
            continue
        local, rows = local_part(state[place.parameter]), local_rows(state[place.parameter])
        if place.expert is None:  # what is read has no name here: it would be held beside the next one
            local.copy_(source.read(name, slice(rows[0], rows[-1] + 1) if rows else slice(0)))
        elif place.expert in rows:
            local[rows.index(place.expert)].copy_(source.read(name))


def quantized_names(source: ModelFolder, config: BackboneConfig) -> dict[str, list[str]]:
    """Return the public names of the quantised weights of a network, by parameter: one, or one for each expert.

    Raises:
        UserError: the experts of a layer are not all quantised in the same way.
    """
    if source.quantization is None:
        return {}
    names: dict[str, list[str]] = {}
    for name, place in public_names(config).items():
        names.setdefault(place.parameter, []).append(name)
    weights, found = source.quantization.weights, {}
    for parameter, parts in names.items():
        layers = {weights.get(name) for name in parts}
        if len(layers) > 1:
            raise UserError(
                f"{source.path}: the experts of {parameter.removesuffix('.weight')} are quantised in more than one way "
                "and cannot be run so; --dtype bf16 runs the model with plain, dequantised weights"
            )
        if layers != {None}:
            found[parameter] = parts
    return found


def _set_formats(network: Network, source: ModelFolder, chosen: Format | None, quantized: Container[str]) -> None:
    """Set each module's format and its weight's dtype on the meta device; quantised weights set theirs later."""
    stored: dict[str, set[torch.dtype]] = {}
    for name, place in public_names(network.config).items():
        stored.setdefault(place.parameter, set()).add(source.tensors[name].dtype)
    if network.config.tie_word_embeddings:
        stored[HEAD] = stored[EMBEDDING]
    for name, module in network.named_modules():
        if isinstance(module, FormattedModule):
            parameter = f"{name}.weight"
            low = parameter in quantized or stored[parameter] == {torch.bfloat16}
            own: Format = "bf16" if low else "fp32"
            module.format = chosen or own
            module.to(module.compute_dtype)


def _owner(network: Network, parameter: str) -> Linear | GroupedLinear:
    return cast("Linear | GroupedLinear", network.get_submodule(parameter.removesuffix(".weight")))


@torch.no_grad()
def hold_quantized(network: Network, source: ModelFolder, quantized: Mapping[str, Sequence[str]]) -> None:
    """Prepare a network on the meta device, not sharded, for `load_quantized`: bf16 weights that do not train."""
    assert source.quantization is not None
    for parameter, names in quantized.items():
        module = _owner(network, parameter)
        module.format, module.product = source.quantization.weights[names[0]].format, PlainProduct()
        module.weight = nn.Parameter(module.weight.bfloat16(), requires_grad=False)


def load_quantized(network: Network, source: ModelFolder, quantized: Mapping[str, Sequence[str]]) -> None:
    """Let a network multiply by the quantised weights of a MODEL, as `load_model` does; a rank keeps what it holds.

    Args:
        network: materialised, sharded or not; see `hold_quantized`.
        source: the MODEL.
        quantized: see `quantized_names`.
    """
    for parameter, names in quantized.items():
        module = _owner(network, parameter)
        weights = map(source.read_quantized, names)
        quantized_product.fill(module, weights, local_part(module.weight), local_rows(module.weight))


def _describe(network: Network, source: ModelFolder, quantized: dict[str, list[str]], dtype: str) -> str:
    """Return in a line how a quantised model runs."""
    assert source.quantization is not None
    if dtype != "auto":
        return f"{source.path}: runs with dequantised weights in {dtype}; inputs, keys and values are not quantised"
    kinds: Counter[str] = Counter()
    for parameter, names in quantized.items():
        layer, codes = source.quantization.weights[names[0]], _owner(network, parameter).weight.dtype != torch.bfloat16
        what = f"{layer.format.upper()} weights{' and inputs' if layer.inputs else ''}"
        kinds[f"{what}, {'by scaled_mm' if codes else 'emulated'}"] += 1
    modules = [module for module in network.modules() if isinstance(module, FormattedModule)]
    plain = " and ".join(sorted({module.format for module in modules if isinstance(module.product, PlainProduct)}))
    parts = [*(f"{kind} (modules: {count})" for kind, count in kinds.items()), f"{plain} (the rest)"]
    cached = "; keys and values in FP8" if source.quantization.kv_scales else ""
    return f"{source.path}: runs as it is served: {'; '.join(parts)}{cached}"
