"""Depthwise causal convolution with SiLU that does not cross document borders.

On a CPU the documents are laid out one behind the other with k - 1 zeros between them, so that one plain convolution
(oneDNN's depthwise kernel on channels-last data, some ten times faster than the sum below) cannot see across a border;
the backward pass computes the same layout again instead of keeping it. On CUDA, where the number of documents would
have to be asked for, a sum of shifted, masked products.
Shapes: B rows, T positions, C channels, k taps, S = B x T + (k - 1) x (documents + 1) positions of the spaced layout.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from modules.ops.documents import DocumentLayout
from modules.ops.kernels import device_kind, uncompiled


def causal_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, documents: DocumentLayout | None = None
) -> Tensor:
    """Compute `silu(bias + sum_j weight[:, k - 1 - j] * x[t - j])` over the taps inside t's document.

    Args:
        x: [B, T, C], fp32 or bf16; sums are fp32, rounded once, as fused kernels do.
        weight: fp32 [C, k].
        bias: fp32 [C] or None.
        documents: borders the taps must not cross; None: each row is one document.

    Returns:
        [B, T, C] in the dtype of `x`.
    """
    convolution = shifted_convolution if device_kind(x) == "cuda" else spaced_convolution
    return convolution(x, weight, bias, documents)


def shifted_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, documents: DocumentLayout | None) -> Tensor:
    """Compute `causal_convolution` without asking for the number of documents."""
    return _ShiftedConvolution.apply(x, weight, bias, None if documents is None else documents.ids)


@uncompiled  # a graph would hold for one number of documents only
def spaced_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, documents: DocumentLayout | None) -> Tensor:
    """Compute `causal_convolution` over spaced documents."""
    if documents is None:
        documents = DocumentLayout.of_rows(x.shape[0], x.shape[1], x.device)
    return _SpacedConvolution.apply(x, weight, bias, documents)


class _ShiftedConvolution(Function):
    """The convolution as a sum of shifted products, masked at the borders; keeps its input and computes again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias, ids)
        return F.silu(_sum_of_taps(x.float(), weight, bias, ids), inplace=True).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        grad: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight, bias, ids = ctx.saved_tensors
        dtype, taps = x.dtype, weight.shape[1]
        x = x.float()
        grad = torch.ops.aten.silu_backward(grad.float(), _sum_of_taps(x, weight, bias, ids))
        grad_x, grad_taps = grad * weight[:, -1], [(grad * x).sum((0, 1))]
        for shift in range(1, taps):
            grad_taps.append((grad * _shifted(x, ids, shift)).sum((0, 1)))
            grad_x.addcmul_(_shifted(grad, ids, -shift), weight[:, taps - 1 - shift])
        grad_bias = grad.sum((0, 1)) if bias is not None else None
        return grad_x.to(dtype), torch.stack(grad_taps[::-1], 1), grad_bias, None


def _sum_of_taps(x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None) -> Tensor:
    """Return the convolution of fp32 [B, T, C] before SiLU."""
    out = x * weight[:, -1]
    for shift in range(1, weight.shape[1]):
        out.addcmul_(_shifted(x, ids, shift), weight[:, -1 - shift])
    return out if bias is None else out.add_(bias)


def _shifted(x: Tensor, ids: Tensor | None, shift: int) -> Tensor:
    """Return x[t - shift] at position t, 0 where that is in no or another document; x is [B, T, C]."""
    length = max(x.shape[1] - abs(shift), 0)
    early, late = slice(0, length), slice(x.shape[1] - length, None)
    source, target = (early, late) if shift > 0 else (late, early)
    out = torch.zeros_like(x)
    part = x[:, source]
    out[:, target] = part if ids is None else torch.where((ids[:, early] == ids[:, late]).unsqueeze(-1), part, 0)
    return out


class _SpacedConvolution(Function):
    """The convolution over documents with k - 1 zeros between them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, documents: DocumentLayout) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.documents = documents
        spaced = _space_out(x, documents, weight.shape[1] - 1)
        return F.silu(_convolve(spaced, weight, bias, documents), inplace=True).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        grad: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight, bias = ctx.saved_tensors
        taps = weight.shape[1]
        spaced = _space_out(x, ctx.documents, taps - 1)
        before_silu = _convolve(spaced, weight, bias, ctx.documents)
        grad = torch.ops.aten.silu_backward(grad.float(), before_silu)
        grad_spaced = _space_out(grad, ctx.documents, taps - 1)
        # Each position's gradient comes from the outputs at and behind it: the convolution with the taps reversed.
        grad_x = _depthwise(grad_spaced, weight.flip(1), None)
        grad_x = _close_up(grad_x, ctx.documents, taps - 1, taps - 1).to(x.dtype)
        length, product = len(spaced), torch.empty_like(spaced)
        grad_taps = []
        for shift in range(taps - 1, -1, -1):
            part = product[: length - shift]
            torch.mul(grad_spaced[shift:], spaced[: length - shift], out=part)
            grad_taps.append(part.sum(0))
        return grad_x, torch.stack(grad_taps, 1), grad.sum((0, 1)) if bias is not None else None, None


def _space_out(x: Tensor, documents: DocumentLayout, gap: int) -> Tensor:
    """Return fp32 [S, C]: the positions of [B, T, C] with `gap` zeros before each document and at the end."""
    flat = x.flatten(0, 1)
    spaced = flat.new_empty(len(flat) + gap * (len(documents.spans) + 1), flat.shape[1], dtype=torch.float32)
    shift = gap
    for start, end in documents.spans:
        spaced[start + shift - gap : start + shift] = 0
        spaced[start + shift : end + shift] = flat[start:end]
        shift += gap
    spaced[len(flat) + shift - gap :] = 0
    return spaced


def _close_up(spaced: Tensor, documents: DocumentLayout, gap: int, first: int) -> Tensor:
    """Return [B, T, C]: the rows of the positions in the spaced layout, the first of which is row `first`."""
    shifted = [
        spaced[start + number * gap + first :][: end - start] for number, (start, end) in enumerate(documents.spans)
    ]
    return torch.cat(shifted).view(*documents.ids.shape, -1)


def _convolve(spaced: Tensor, weight: Tensor, bias: Tensor | None, documents: DocumentLayout) -> Tensor:
    """Return the convolution, fp32 [B, T, C], of positions laid out by `_space_out`."""
    return _close_up(_depthwise(spaced, weight, bias), documents, weight.shape[1] - 1, 0)


@torch.library.custom_op("superbolt::depthwise_convolution", mutates_args=())
def _depthwise(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve fp32 [S, C] along S with [C, k]; returns [S - k + 1, C].

    An operation of its own, so that counters of matrix products see the same step on every device.
    """
    image = rows.view(1, 1, *rows.shape).permute(0, 3, 1, 2)  # [1, C, 1, S], channels last
    out = F.conv2d(image, weight[:, None, None], bias, groups=rows.shape[1])
    return out.permute(0, 2, 3, 1).flatten(0, 2)


@_depthwise.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(len(rows) - weight.shape[1] + 1, rows.shape[1])
