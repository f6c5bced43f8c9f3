"""The largest magnitudes that reach the linear layers of a network, and its keys and values, on given texts.

Texts are packed without padding: what stands for nothing must leave no trace in a maximum, and padding would be routed
to experts like any token.
Shapes: E experts, R rows sorted by expert, N tokens of some texts, I in-features.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modules.backbone.attention import Attention
from modules.backbone.model import Network
from modules.checkpoints.names import MTP
from modules.errors import UserError
from modules.ops.experts import row_experts
from modules.precision.formats import tensor_amax
from modules.precision.linear import GroupedLinear, Linear


class Packed(NamedTuple):
    """Texts one after the other."""

    tokens: Tensor
    """int64 [1, N]."""
    document_ids: Tensor
    """int32 [1, N], the number of the text."""


class Calibration(NamedTuple):
    """What was seen; on the CPU."""

    inputs: dict[str, Tensor]
    """Largest magnitude of a module's inputs in bf16, by module name: fp32 scalar, or [E] of stacked experts (0 where
    an expert saw nothing)."""
    tokens: dict[str, Tensor]
    """Tokens of each expert, by name of a module of stacked experts: int64 [E]."""
    keys: dict[str, Tensor]
    """Largest magnitude of keys in bf16, by attention module: fp32 scalar."""
    values: dict[str, Tensor]
    """Largest magnitude of values, likewise."""


def pack(rows: Sequence[Sequence[int]], batch_tokens: int, device: torch.device | str = "cpu") -> Iterator[Packed]:
    """Yield texts packed into rows of at most `batch_tokens` tokens, in order; longer texts are cut."""
    pieces = [row[at : at + batch_tokens] for row in rows for at in range(0, len(row), batch_tokens)]
    waiting: list[Sequence[int]] = []
    for piece in pieces:
        if waiting and sum(map(len, waiting)) + len(piece) > batch_tokens:
            yield _join(waiting, device)
            waiting = []
        waiting.append(piece)
    if waiting:
        yield _join(waiting, device)


def _join(pieces: Sequence[Sequence[int]], device: torch.device | str) -> Packed:
    tokens = torch.tensor([token for piece in pieces for token in piece])
    ids = torch.repeat_interleave(torch.arange(len(pieces)), torch.tensor([len(piece) for piece in pieces])).int()
    return Packed(tokens[None].to(device), ids[None].to(device))


@torch.inference_mode()
def calibrate(
    network: Network,
    rows: Sequence[Sequence[int]],
    modules: Sequence[str],
    *,
    keys_and_values: bool,
    batch_tokens: int,
    advance: Callable[[int], None],
) -> Calibration:
    """Run a network over texts and keep maxima.

    Args:
        network: in evaluation mode.
        rows: token ids of each text.
        modules: names of the linear modules to look at; with one of the MTP block, that runs too, at every depth.
        keys_and_values: whether to look at them too, the MTP block's included.
        batch_tokens: most tokens in a forward pass.
        advance: gets the tokens of each pass.

    Raises:
        UserError: a layer gets numbers that are not finite.
    """
    found = Calibration({}, {}, {}, {})
    attentions = {name for name, module in network.named_modules() if isinstance(module, Attention)}
    seen = {*modules, *(attentions if keys_and_values else ())}
    depths = network.config.num_nextn_predict_layers if any(name.startswith(MTP) for name in seen) else 0
    with ExitStack() as hooks:
        for name, module in network.named_modules():
            if name in seen and isinstance(module, Linear | GroupedLinear):
                hooks.enter_context(module.register_forward_pre_hook(_see_inputs(found, name)))
            if name in seen and isinstance(module, Attention):
                for projection, maxima in ((module.k_proj, found.keys), (module.v_proj, found.values)):
                    hooks.enter_context(projection.register_forward_hook(_see_results(maxima, name)))
        device = network.backbone.embeddings.weight.device
        for batch in pack(rows, batch_tokens, device):
            network(batch.tokens, batch.document_ids, mtp_depths=depths)
            advance(batch.tokens.numel())
    for maxima in (found.inputs, found.keys, found.values):
        for name, amax in maxima.items():
            if not amax.isfinite().all():
                raise UserError(
                    f"calibration: {name} gets numbers that are not finite: weights are damaged, or too large for bf16"
                )
            maxima[name] = amax.bfloat16().float().cpu()  # as served: products get their inputs in bf16
    return found._replace(tokens={name: tokens.cpu() for name, tokens in found.tokens.items()})


def _see_inputs(found: Calibration, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """Return a hook that keeps the maximum of a module's inputs, per expert where there are several."""

    def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, GroupedLinear):
            x, offsets = inputs
            experts = row_experts(len(x), offsets)
            amax = torch.zeros(len(offsets), device=x.device).scatter_reduce(
                0, experts, tensor_amax(x, stacked=True), "amax"
            )
            tokens = torch.diff(offsets.long(), prepend=offsets.new_zeros(1))
            found.tokens[name] = found.tokens[name] + tokens if name in found.tokens else tokens
        else:
            amax = tensor_amax(inputs[0])
        _raise(found.inputs, name, amax)

    return see


def _see_results(maxima: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def see(module: nn.Module, inputs: tuple[Any, ...], result: Tensor) -> None:
        _raise(maxima, name, tensor_amax(result))

    return see


def _raise(maxima: dict[str, Tensor], name: str, amax: Tensor) -> None:
    maxima[name] = torch.maximum(maxima[name], amax) if name in maxima else amax
