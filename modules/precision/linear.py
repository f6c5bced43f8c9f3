"""The modules that compute matrix products, each in a format of its own.

Master weights stay fp32; a module casts its weight and its input to its format and returns its result in it. So the
forward pass of one process, of FSDP2 (which gathers weights in the same dtype) and of every stage is the same, without
autocast. Operands of a quantised format are cast to bf16; how they are multiplied is the module's `Product`.
Shapes: E experts, R rows, I in-features, O out-features, V vocabulary, D hidden.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.ops import native
from modules.ops.chunked_head import (
    Objective,
    TokenLogProbabilities,
    chunked_loss,
    token_log_probabilities,
)
from modules.precision.adapter import Adapter
from modules.precision.formats import COMPUTE_DTYPE, Format
from modules.precision.scheme import PlainProduct, Product


class FormattedModule(nn.Module):
    """A module with an fp32 master `weight` whose computation runs in `format`."""

    format: Format = "fp32"
    """Name of the format; set by `recipe.assign_formats`."""
    product: Product = PlainProduct()
    """How `Linear` and `GroupedLinear` multiply; set by `recipe.assign_formats` and `quantized_product.install`."""
    writes_residual: bool = False
    """Whether its results are added to the residual stream: the initial weight is smaller then."""
    active_share: float = 1.0
    """Share of its weights that a token is multiplied by."""
    weight: nn.Parameter

    @property
    def active(self) -> int:
        """Number of its weights that a token is multiplied by."""
        return round(self.weight.numel() * self.active_share)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the operands and of the result."""
        return COMPUTE_DTYPE[self.format]


class Linear(FormattedModule):
    """`y = x W^T` without bias.

    Args:
        in_features: I.
        out_features: O.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.adapter: Adapter | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., I] of any floating dtype to [..., O] in the compute dtype."""
        x = x.to(self.compute_dtype)
        out = self.product.linear(x, self.weight)
        return out if self.adapter is None else self.adapter(x, out)


class GroupedLinear(FormattedModule):
    """One `Linear` per expert, weights stacked.

    Args:
        experts: E.
        in_features: I.
        out_features: O.
        top_k: K, how many of them a token passes.
    """

    def __init__(self, experts: int, in_features: int, out_features: int, top_k: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features))
        self.active_share = top_k / experts
        self.adapter: Adapter | None = None

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Map rows [R, I] sorted by expert, with end rows `offsets` int32 [E], to [R, O] in the compute dtype."""
        x = x.to(self.compute_dtype)
        out = self.product.grouped_linear(x, self.weight, offsets)
        return out if self.adapter is None else self.adapter(x, out, offsets)


class Embedding(FormattedModule):
    """Token embedding; its format is the dtype of the residual stream.

    Args:
        vocab_size: V.
        hidden_size: D.
    """

    active_share = 0.0

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up int64 [...] ids; returns [..., D] in the compute dtype."""
        return F.embedding(tokens, self.weight).to(self.compute_dtype)


class Head(Linear):
    """Output head: logits, or what is made of them without ever holding those of all tokens."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        objective: Objective | None = None,
        **arguments: Any,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return `chunked_loss` of [N, D] and its arguments, or without an objective `logits`."""
        if objective is None:
            return self.logits(x, **arguments)
        dtype = self.compute_dtype
        return chunked_loss(x.to(dtype), self.weight.to(dtype), objective, **arguments)

    def token_log_probabilities(self, x: Tensor, labels: Tensor, **arguments: Any) -> TokenLogProbabilities:
        """Return `chunked_head.token_log_probabilities` of [N, D] and its arguments."""
        dtype = self.compute_dtype
        return token_log_probabilities(x.to(dtype), self.weight.to(dtype), labels, **arguments)

    def logits(self, x: Tensor, vocabulary: int | None = None) -> Tensor:
        """Map [..., D] to fp32 logits [..., V], or to those of the `vocabulary` lowest ids.

        Under FSDP2 the weight must be gathered: by calling the module instead, or by `ShardedStrategy.lend`.
        """
        few = x.to(self.compute_dtype)
        operands = self.product.operands
        if operands is not None and native.applies(few, self.weight):
            return native.few_rows_linear(few, self.weight[:vocabulary], operands)
        return self.product.linear(few, self.weight[:vocabulary]).float()
