"""The convolution and the SSD scan going on from a state, for a few positions at a time and without gradients.

One position updates the state and reads it. Several positions are read without touching the state, and taken over
afterwards up to a count of each row: drafts that turn out wrong then cost nothing to undo. Long stretches are the
business of `chunked_scan.continued_scan`.
Shapes: B rows, T positions, H heads, P head dim, G groups, R = H / G heads per group, N state, C channels, k taps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def continued_convolution(window: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve depthwise and apply SiLU, see `causal_convolution`.

    Args:
        window: [B, k - 1 + T, C]: the k - 1 positions before, then the new ones; fp32 or bf16, sums are fp32.
        weight: fp32 [C, k].
        bias: fp32 [C] or None.

    Returns:
        [B, T, C] in the dtype of `window`.
    """
    taps = weight.shape[1]
    length = window.shape[1] - taps + 1
    wide = window.float()
    if length == 1:
        out = (wide * weight.T).sum(1, keepdim=True)
    else:
        out = wide[:, :length] * weight[:, 0]
        for tap in range(1, taps):
            out.addcmul_(wide[:, tap : tap + length], weight[:, tap])
    if bias is not None:
        out += bias
    return F.silu(out, inplace=True).to(window.dtype)


def step_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> Tensor:
    """Take one position over into the state, in place, and read it: h' = exp(dt A) h + dt x B^T, y = h' C + D x.

    Args:
        x: [B, 1, H, P], fp32 or bf16.
        dt: fp32 [B, 1, H], final step sizes.
        A: fp32 [H], negative.
        B: [B, 1, G, N].
        C: [B, 1, G, N].
        D: fp32 [H].
        state: fp32 [B, H, P, N], contiguous; changed.

    Returns:
        y [B, 1, H, P] in the dtype of `x`.
    """
    rows = len(x) * B.shape[2]
    wide = x.float()
    inner = state.view(rows, -1, state.shape[-1])
    state.mul_(torch.exp(dt * A).view(len(x), -1, 1, 1))
    inner.baddbmm_((wide * dt.unsqueeze(-1)).view(rows, -1, 1), B.float().reshape(rows, 1, -1))
    y = torch.bmm(inner, C.float().reshape(rows, -1, 1)).view(x.shape)
    return y.addcmul_(wide, D.unsqueeze(-1)).to(x.dtype)


def read_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> Tensor:
    """Return y [B, T, H, P] of a few positions that go on from a state, which stays as it is.

    The arguments are those of `step_scan` for T positions.
    """
    batch, length, heads, _ = x.shape
    groups = B.shape[2]
    total = (dt * A).cumsum(1).transpose(1, 2)  # [B, H, T]
    later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu_(1)
    inside = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill_(later, float("-inf")).exp_()
    B, C = _per_group(B), _per_group(C)
    scores = torch.bmm(C, B.transpose(1, 2)).view(batch, groups, 1, length, length)
    mixed = inside.unflatten(1, (groups, -1)) * scores
    u = (x * dt.unsqueeze(-1)).transpose(1, 2).reshape(batch * heads, length, -1)
    y = torch.bmm(mixed.reshape(batch * heads, length, length), u).view(batch, heads, length, -1)
    across = torch.bmm(C, state.view(batch * groups, -1, state.shape[-1]).transpose(1, 2))
    across = across.view(batch, groups, length, heads // groups, -1).transpose(2, 3).flatten(1, 2)
    y.addcmul_(across, total.exp_().unsqueeze(-1))
    return y.transpose(1, 2).addcmul_(x.float(), D.unsqueeze(-1)).to(x.dtype)


def take_over(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, state: Tensor) -> None:
    """Bring a state over T positions, in place.

    The arguments are those of `step_scan` for T positions; positions with dt = 0 leave the state as it is.
    """
    batch, length = x.shape[:2]
    total = (dt * A).cumsum(1)
    weights = (total[:, -1:] - total).exp_() * dt
    u = (x * weights.unsqueeze(-1)).view(batch, length, B.shape[2], -1).permute(0, 2, 3, 1)
    state.mul_(total[:, -1].exp().view(batch, -1, 1, 1))
    B = _per_group(B)
    state.view(len(B), -1, state.shape[-1]).baddbmm_(u.reshape(len(B), -1, length), B)


def _per_group(tensor: Tensor) -> Tensor:
    """Copy [B, T, G, N] to fp32 [B x G, T, N]."""
    return tensor.float().transpose(1, 2).flatten(0, 1)


def round_stochastically(values: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Round fp32 to fp16 up or down, with the probability that makes the mean exact.

    A state that is rounded to nearest after every token drifts: completions of Nemotron 3 Super got 37 to 40% longer
    (its report, table 8); rounded stochastically they do not.

    Args:
        values: fp32, finite; beyond the range of fp16 the result is the largest number of that sign.
        dtype: torch.float16.
        generator: of the device of `values`; None: the global one.

    Returns:
        fp16 of the same shape.
    """
    limits = torch.finfo(dtype)
    exponent = torch.frexp(values).exponent.clamp_(min=-13) - 11  # 10 bits behind the leading one; -24 below 2**-14
    units = torch.ldexp(values, -exponent)
    low = units.floor()
    draws = torch.rand(values.shape, generator=generator, device=values.device)
    units = low + (draws < units - low)
    return torch.ldexp(units, exponent).clamp_(limits.min, limits.max).to(dtype)
