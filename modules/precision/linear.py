"""The modules that compute matrix products, each in a format of its own.

Master weights stay fp32; a module casts its weight and its input to its format and returns its result in it. So the
forward pass of one process, of FSDP2 (which gathers weights in the same dtype) and of every stage is the same, without
autocast. Operands of a quantised format are cast to bf16; how they are multiplied is the module's `Product`.
Shapes: E experts, R rows, I in-features, O out-features, V vocabulary, D hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.ops import native
from modules.ops.cross_entropy import linear_cross_entropy
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

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., I] of any floating dtype to [..., O] in the compute dtype."""
        return self.product.linear(x.to(self.compute_dtype), self.weight)


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

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Map rows [R, I] sorted by expert, with end rows `offsets` int32 [E], to [R, O] in the compute dtype."""
        return self.product.grouped_linear(x.to(self.compute_dtype), self.weight, offsets)


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
    """Output head: the cross-entropy without ever holding the logits of all tokens, or logits."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        labels: Tensor | None = None,
        token_weights: Tensor | None = None,
        vocabulary: int | None = None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Return logits, or the weighted loss where labels are given.

        Args:
            x: [..., D] without labels, [N, D] with labels.
            labels: int64 [N] or None.
            token_weights: fp32 [N], see `linear_cross_entropy`; goes with `labels`.
            vocabulary: without labels, how many of the lowest ids to compute; None: all.

        Returns:
            Without labels: fp32 logits [..., V or `vocabulary`]. With labels: (weighted sum of nats, nats [N]), fp32.
        """
        dtype = self.compute_dtype
        if labels is None or token_weights is None:
            few = x.to(dtype)
            if isinstance(self.product, PlainProduct) and native.applies(few, self.weight):
                return native.few_rows_linear(few, self.weight[:vocabulary])
            return self.product.linear(few, self.weight[:vocabulary]).float()
        return linear_cross_entropy(x.to(dtype), self.weight.to(dtype), labels, token_weights)
