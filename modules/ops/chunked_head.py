"""The output head in chunks of tokens, so that [tokens, V] logits never exist.

`chunked_loss` takes sums whose weights are known beforehand: it works out the gradients of the hidden states and of the
head chunk by chunk in the forward pass, two more matmuls there instead of keeping logits (V = 131072: 0.5 MB a token in
fp32) or computing them twice. `token_log_probabilities` returns what one can go on computing with, and computes the
logits again in the backward pass. Neither can be differentiated twice.
Shapes: N tokens, n of them computed, C tokens of a chunk, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from modules.batch import IGNORED_LABEL
from modules.ops.kernels import device_kind

CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**27}
"""Logits held at once (fp32): 16 MiB stay in a CPU's cache, 512 MiB keep a GPU busy."""

Objective = Callable[..., tuple[dict[str, Tensor], Tensor]]
"""Takes fp32 logits [C, V], which it may overwrite, and per-token inputs [C, ...] by name; runs without autograd.
Returns results by name, new tensors [C, ...], one of them `loss` (fp32 [C]), and the gradient of the sum of the losses
in the logits, fp32 [C, V], the logits' own tensor or a new one."""


@dataclass(frozen=True)
class LogitTransform:
    """What makes logits of the products z of the head: soft_cap x tanh(scale x (z + bias) / soft_cap) / temperature."""

    scale: float = 1.0
    """Factor on the products."""
    bias: Tensor | None = None
    """[V], differentiable; None: 0."""
    soft_cap: float | None = None
    """Bound on the size of what the temperature divides; None: no tanh."""
    temperature: float = 1.0
    """Divides the logits."""

    @property
    def factor(self) -> float:
        """What the derivative is without a cap."""
        return self.scale / self.temperature

    def apply_(self, logits: Tensor) -> Tensor | None:
        """Transform fp32 [..., V] in place; return the derivative over `factor`, None where that is 1."""
        if self.bias is not None:
            logits += self.bias
        if self.soft_cap is None:
            if self.factor != 1.0:
                logits *= self.factor
            return None
        logits.mul_(self.scale / self.soft_cap).tanh_()
        slope = 1 - logits.square()
        logits *= self.soft_cap / self.temperature
        return slope


IDENTITY = LogitTransform()


class TokenLogProbabilities(NamedTuple):
    """Result of `token_log_probabilities`."""

    log_probabilities: Tensor
    """fp32 [N], differentiable: of each label, in nats; 0 where a token does not count."""
    entropies: Tensor
    """fp32 [N], differentiable: of each distribution over the vocabulary, in nats; 0 where a token does not count."""


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    objective: Objective,
    *,
    token_weights: Tensor,
    positions: Tensor | None = None,
    transform: LogitTransform = IDENTITY,
    **per_token: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a weighted sum of what an objective makes of the logits `hidden @ weight.T`.

    Args:
        hidden: [N, D], fp32 or bf16.
        weight: [V, D], dtype of `hidden`.
        objective: see `Objective`.
        token_weights: fp32 [N], weight of each token's loss in the sum; detached.
        positions: int64 [n], distinct: the tokens that count, and cost; None: all.
        transform: of the logits.
        per_token: inputs of the objective [N, ...], detached. Where one named `labels` is `IGNORED_LABEL`, the token
            does not count, whatever its weight: the objective sees label 0 there.

    Returns:
        (sum over tokens of weight x loss, fp32 scalar, differentiable in `hidden`, `weight` and the transform's bias;
        the objective's results, detached, [N, ...], 0 where a token does not count).
    """
    assert not any(given.requires_grad for given in (token_weights, *per_token.values())), "they would get no gradient"
    tokens, kept = len(hidden), None
    hidden, scales = _select(hidden, positions), _select(token_weights, positions)
    inputs = {name: _select(tensor, positions) for name, tensor in per_token.items()}
    if "labels" in inputs:
        kept, inputs["labels"] = _split_ignored(inputs["labels"])
        scales = torch.where(kept, scales, 0.0)
    leaves = (hidden, weight, transform.bias)
    needed = [leaf is not None and leaf.requires_grad and torch.is_grad_enabled() for leaf in leaves]
    chunks = []
    with torch.no_grad():
        products = _Products(hidden, weight, transform, needed)
        for part, logits in products:
            results, gradient = objective(logits, **{name: tensor[part] for name, tensor in inputs.items()})
            chunks.append(results)
            if not any(needed):
                continue
            if gradient is logits:  # an objective of so few passes over V would feel one more
                products.add_gradients(part, gradient, scales[part])
            else:
                products.add_gradients(part, gradient.mul_(scales[part, None]))
        results = {name: _clear(torch.cat([chunk[name] for chunk in chunks]), kept) for name in chunks[0]}
        loss = (results["loss"] * scales).sum()
    if any(needed):
        loss = _WithGradients.apply(loss, products.gradients, *leaves)
    return loss, {name: _spread(values, positions, tokens) for name, values in results.items()}


def token_log_probabilities(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    positions: Tensor | None = None,
    transform: LogitTransform = IDENTITY,
) -> TokenLogProbabilities:
    """Compute the log-probability of each label, and the entropy, of the logits `hidden @ weight.T`.

    Args:
        hidden: [N, D], fp32 or bf16.
        weight: [V, D], dtype of `hidden`.
        labels: int64 [N]; tokens with `IGNORED_LABEL` do not count.
        positions: int64 [n], distinct: the tokens that count, and cost; None: all.
        transform: of the logits.

    Returns:
        `TokenLogProbabilities`, differentiable in `hidden`, `weight` and the transform's bias.
    """
    kept, targets = _split_ignored(_select(labels, positions))
    found = _LogProbabilities.apply(_select(hidden, positions), weight, transform.bias, targets, transform)
    return TokenLogProbabilities(*(_spread(_clear(values, kept), positions, len(hidden)) for values in found))


def _select(values: Tensor, positions: Tensor | None) -> Tensor:
    return values if positions is None else values.index_select(0, positions)


def _spread(values: Tensor, positions: Tensor | None, tokens: int) -> Tensor:
    """Undo `_select`, with zeros elsewhere."""
    if positions is None:
        return values
    return values.new_zeros(tokens, *values.shape[1:]).index_copy(0, positions, values)


def _split_ignored(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (bool: whether a label counts, the labels with 0 for those that do not)."""
    kept = labels != IGNORED_LABEL
    return kept, torch.where(kept, labels, 0)


def _clear(values: Tensor, kept: Tensor | None) -> Tensor:
    """Return `values` [n, ...] with 0 where bool [n] `kept` is false."""
    return values if kept is None else values.masked_fill(~kept.view(-1, *[1] * (values.ndim - 1)), 0)


class _Products:
    """The transformed `hidden @ weight.T`, chunk by chunk, and the gradients that come back through it.

    Args:
        hidden: [n, D].
        weight: [V, D].
        transform: of the logits.
        needed: whether hidden, weight and the transform's bias get a gradient.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, transform: LogitTransform, needed: Sequence[bool]) -> None:
        self.hidden, self.weight, self.transform = hidden, weight, transform
        sums = torch.float32
        self.gradients = [
            torch.empty_like(hidden) if needed[0] else None,
            torch.zeros_like(weight, dtype=sums) if needed[1] else None,
            weight.new_zeros(len(weight), dtype=sums) if needed[2] else None,
        ]
        chunk = max(1, min(len(hidden), CHUNK_LOGITS[device_kind(hidden)] // len(weight)))
        # Buffers are reused: a fresh allocation of this size costs more in page faults than the arithmetic in it.
        self._rounded = hidden.new_empty(chunk, len(weight))
        self._logits = self._rounded.float()
        self._slope: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield each chunk and its fp32 logits [C, V], overwritten by the next; an empty chunk where n is 0."""
        chunk = len(self._logits)
        for start in range(0, max(len(self.hidden), 1), chunk):
            part = slice(start, start + chunk)
            rows = self.hidden[part]
            logits, rounded = self._logits[: len(rows)], self._rounded[: len(rows)]
            torch.mm(rows, self.weight.T, out=rounded)
            if logits.dtype != rounded.dtype:
                logits.copy_(rounded)
            self._slope = self.transform.apply_(logits)
            yield part, logits

    def add_gradients(self, part: slice, gradient: Tensor, scales: Tensor | None = None) -> None:
        """Add what the newest chunk gives to `gradients`.

        Args:
            part: the chunk.
            gradient: fp32 [C, V], in the logits; overwritten.
            scales: fp32 [C], factors of its rows that the D-wide sides of the products take instead of the V-wide one:
                a pass less, and in bf16 one more rounding; None: 1.
        """
        for_hidden, for_weight, for_bias = self.gradients
        if self._slope is not None:
            gradient *= self._slope
        if self.transform.factor != 1.0:
            gradient *= self.transform.factor
        if for_bias is not None:
            for_bias += gradient.sum(0) if scales is None else scales @ gradient
        if gradient.dtype != self.hidden.dtype:
            gradient = self._rounded[: len(gradient)].copy_(gradient)
        if for_hidden is not None:
            products = gradient @ self.weight
            for_hidden[part] = products if scales is None else products * scales.unsqueeze(-1)
        if for_weight is not None:
            rows = self.hidden[part]
            scaled = rows if scales is None else (rows * scales.unsqueeze(-1)).to(rows.dtype)
            if gradient.dtype == torch.float32:
                torch.addmm(for_weight, gradient.T, scaled, out=for_weight)
            else:
                for_weight += gradient.T @ scaled


class _WithGradients(Function):
    """The loss, whose gradients in hidden, weight and bias are known already."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        gradients: list[Tensor | None],
        *leaves: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        grad_loss: Tensor,
    ) -> tuple[Tensor | None, ...]:
        return None, None, *(None if g is None else g * grad_loss.to(g.dtype) for g in ctx.saved_tensors)


class _LogProbabilities(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        transform: LogitTransform,
    ) -> tuple[Tensor, Tensor]:
        chosen, entropies = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(2))
        for part, logits in _Products(hidden, weight, transform, (False, False, False)):
            logs = logits.log_softmax(-1)
            chosen[part] = logs.gather(1, labels[part, None]).squeeze(1)
            entropies[part] = torch.special.entr(logs.exp_()).sum(-1)
        ctx.save_for_backward(hidden, weight, labels, entropies)
        ctx.transform = transform
        ctx.set_materialize_grads(False)
        return chosen, entropies

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        grad_chosen: Tensor | None,
        grad_entropies: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, entropies = ctx.saved_tensors
        products = _Products(hidden, weight, ctx.transform, ctx.needs_input_grad[:3])
        for part, logits in products:
            probabilities = logits.softmax(-1)
            gradient = torch.zeros_like(probabilities)
            if grad_chosen is not None:
                share = grad_chosen[part, None]
                gradient.addcmul_(probabilities, share, value=-1).scatter_add_(1, labels[part, None], share)
            if grad_entropies is not None:
                weighted = torch.special.entr(probabilities) - probabilities * entropies[part, None]
                gradient.addcmul_(weighted, grad_entropies[part, None])
            products.add_gradients(part, gradient)
        return *products.gradients, None, None
