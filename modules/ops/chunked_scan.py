"""The SSD scan in its chunked form, forward and backward in batched matrix products (arXiv 2405.21060, section 6).

With a_i the running sum of dt A inside a chunk, u_j = dt_j x_j, and h the state before the chunk:

    y_i = sum_{j <= i} exp(a_i - a_j) (C_i B_j) u_j + exp(a_i) C_i h,    h' = exp(a_q) h + sum_j exp(a_q - a_j) B_j u_j

over the positions of one document. C B^T is computed once per group and never expanded to heads. The backward pass is
written out: differentiated automatically, the same products need twice the passes over [q, q] and [q, P] arrays, which
is what the time goes into on a CPU. Chunks are taken in stretches of `_STRETCH` positions, so that these arrays stay in
a CPU's cache and do not grow with the length of a row.
Shapes: B rows, T positions, H heads, P head dim, G groups, R = H / G heads per group, N state, c chunks of q positions;
inside, heads come first: [R, G, B, c, q, P], so that what a group shares broadcasts and every product is contiguous.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from modules.ops.kernels import uncompiled

_STRETCH = 4096
"""Positions, over all rows, that are computed at once."""


@uncompiled  # torch.compile fails on its written-out backward pass
def chunked_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, ids: Tensor | None, chunk_size: int
) -> Tensor:
    """Run the scan from a zero state.

    Args:
        x: [B, T, H, P], fp32 or bf16.
        dt: fp32 [B, T, H], final step sizes.
        A: fp32 [H], negative.
        B: [B, T, G, N], dtype of `x`.
        C: [B, T, G, N], dtype of `x`.
        D: fp32 [H], skip weight.
        ids: int32 [B, T]: the state is reset where it changes; None: each row is one document.
        chunk_size: q.

    Returns:
        y [B, T, H, P] in the dtype of `x`.
    """
    if not torch.is_grad_enabled():  # a Function is told that gradients are needed even then, and keeps for them
        x, dt, A, B, C, D = (tensor.detach() for tensor in (x, dt, A, B, C, D))
    return _ChunkedScan.apply(x, dt, A, B, C, D, ids, min(chunk_size, x.shape[1]))


def continued_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Run the scan from a state, without gradients.

    Args:
        x: [B, T, H, P], fp32 or bf16.
        dt: fp32 [B, T, H], final step sizes; 0 leaves the state as it is.
        A: fp32 [H], negative.
        B: [B, T, G, N], dtype of `x`.
        C: [B, T, G, N], dtype of `x`.
        D: fp32 [H], skip weight.
        state: fp32 [B, H, P, N].
        chunk_size: q.

    Returns:
        (y [B, T, H, P] in the dtype of `x`, state after the last position, fp32 [B, H, P, N]).
    """
    inner = state.unflatten(1, (B.shape[2], -1)).permute(1, 0, 4, 2, 3)
    y, inner = _run(x, dt, A, B, C, D, None, min(chunk_size, x.shape[1]), inner, None)
    return y, inner.permute(1, 0, 3, 4, 2).flatten(1, 2).contiguous()


def _run(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    ids: Tensor | None,
    chunk_size: int,
    state: Tensor | None,
    kept: list[Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Return (y, state after the last position fp32 [G, B, N, R, P]); add what the backward pass needs to `kept`."""
    groups = B.shape[2]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for part in _stretches(x, chunk_size):
        inputs = _lay_out(x[:, part], dt[:, part], B[:, part], C[:, part], chunk_size)
        decays = _decay(inputs.dt, A, _chunk_ids(ids, part, chunk_size), x.dtype)
        shape = inputs.u.shape
        scores = torch.bmm(inputs.C, inputs.B.transpose(1, 2))
        mixed = decays.inside * scores.view(groups, *shape[2:5], shape[4])
        out = torch.bmm(mixed.flatten(0, 3), inputs.u.flatten(0, 3)).view(shape).float()
        weighted = _weigh(_heads_last(inputs.u), decays.to_end)
        added = torch.bmm(inputs.B.transpose(1, 2), weighted.flatten(0, 2).flatten(2))
        before, state = _carry(state, decays.whole, added.view(*shape[1:4], -1, shape[0], shape[5]))
        across = torch.bmm(inputs.C, before.flatten(0, 2).flatten(2)).view(weighted.shape)
        out.addcmul_(_heads_first(across), decays.from_start.unsqueeze(-1))
        out.addcmul_(inputs.x, _per_head(D, groups, 4))
        y[:, part] = _join_heads(out)[:, : part.stop - part.start]
        if kept is not None:
            kept += [*decays, scores, before, across]
    assert state is not None, "a scan has at least one position"
    return y, state


class _Inputs(NamedTuple):
    """One stretch of the inputs, heads first."""

    x: Tensor
    """[R, G, B, c, q, P], a view."""
    dt: Tensor
    """fp32 [R, G, B, c, q], a view."""
    u: Tensor
    """[R, G, B, c, q, P]: dt x."""
    B: Tensor
    """[G x B x c, q, N]."""
    C: Tensor
    """[G x B x c, q, N]."""


class _Decays(NamedTuple):
    """What the running sum of dt A makes of one stretch, fp32."""

    inside: Tensor
    """[R, G, B, c, q, q] in the dtype of x: exp(a_i - a_j) for j <= i in the same document, else 0."""
    to_end: Tensor
    """[R, G, B, c, q]: exp(a_q - a_j), 0 outside the document that is open at the end of the chunk."""
    from_start: Tensor
    """[R, G, B, c, q]: exp(a_i), 0 outside the document that was open before the chunk."""
    whole: Tensor
    """[R, G, B, c]: exp(a_q), 0 where a document begins inside the chunk."""


class _ChunkedScan(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        ids: Tensor | None,
        chunk_size: int,
    ) -> Tensor:
        ctx.chunk_size = chunk_size
        kept: list[Tensor] = []
        y, _ = _run(x, dt, A, B, C, D, ids, chunk_size, None, kept if any(ctx.needs_input_grad) else None)
        ctx.save_for_backward(x, dt, A, B, C, D, ids, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        grad: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, None, None]:
        x, dt, A, B, C, D, _, *kept = ctx.saved_tensors
        groups, dtype = B.shape[2], x.dtype
        gradients = _Gradients(
            *[torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, dt, B, C)],
            A=torch.zeros_like(A),
            D=torch.zeros_like(D),
        )
        grad_state: Tensor | None = None
        for part in reversed(_stretches(x, ctx.chunk_size)):
            across, before, scores = kept.pop(), kept.pop(), kept.pop()
            decays = _Decays(*[kept.pop() for _ in _Decays._fields][::-1])
            inputs = _lay_out(x[:, part], dt[:, part], B[:, part], C[:, part], ctx.chunk_size)
            out = _split_heads(_pad(grad[:, part], ctx.chunk_size), groups, ctx.chunk_size).contiguous()
            length = part.stop - part.start
            shape = out.shape
            per_group = scores.view(groups, *shape[2:5], shape[4])

            # Inside chunks: y = (inside * scores) u.
            grad_mixed = torch.bmm(out.flatten(0, 3), inputs.u.flatten(0, 3).transpose(1, 2)).view(decays.inside.shape)
            grad_mixed *= decays.inside
            grad_scores = grad_mixed.sum(0).flatten(0, 2)
            grad_mixed *= per_group
            grad_kernel = grad_mixed.float()
            grad_decay = grad_kernel.sum(-1) - grad_kernel.sum(-2)
            del grad_kernel
            mixed = torch.mul(decays.inside, per_group, out=grad_mixed)
            grad_u = torch.bmm(mixed.flatten(0, 3).transpose(1, 2), out.flatten(0, 3)).view(shape)
            grad_C = torch.bmm(grad_scores, inputs.B).float()
            grad_B = torch.bmm(grad_scores.transpose(1, 2), inputs.C).float()

            # From the state before each chunk: y += from_start * (C before).
            scaled = _weigh(_heads_last(out), decays.from_start)
            grad_decay += _heads_first((scaled * across).sum(-1, dtype=torch.float32))
            scaled = scaled.flatten(0, 2).flatten(2)
            grad_C += torch.bmm(scaled, before.flatten(0, 2).flatten(2).transpose(1, 2))
            grad_before = torch.bmm(inputs.C.transpose(1, 2), scaled).view(before.shape)

            # Through the states: state' = whole * state + added, added = B^T (to_end * u).
            grad_added, grad_whole, grad_state = _carry_back(grad_state, decays.whole, before, grad_before)
            grad_added = grad_added.flatten(0, 2).flatten(2)
            weighted = _weigh(_heads_last(inputs.u), decays.to_end)
            grad_weighted = torch.bmm(inputs.B, grad_added).view(weighted.shape)
            grad_B += torch.bmm(weighted.flatten(0, 2).flatten(2), grad_added.transpose(1, 2))
            grad_to_end = _heads_first((weighted * grad_weighted).sum(-1, dtype=torch.float32))
            grad_decay -= grad_to_end
            grad_decay[..., -1] += grad_to_end.sum(-1) + grad_whole
            grad_u.addcmul_(_heads_first(grad_weighted), decays.to_end.unsqueeze(-1).to(dtype))

            # Into the inputs: u = dt x, a = running sum of dt A, y += D x.
            grad_steps = grad_decay.flip(-1).cumsum(-1).flip(-1)
            grad_dt = (grad_u * inputs.x).sum(-1, dtype=torch.float32)
            grad_dt.addcmul_(grad_steps, _per_head(A, groups, 3))
            grad_x = grad_u.mul_(inputs.dt.unsqueeze(-1).to(dtype)).addcmul_(out, _per_head(D, groups, 4).to(dtype))
            gradients.x[:, part] = _join_heads(grad_x)[:, :length]
            gradients.dt[:, part] = _join_heads(grad_dt.unsqueeze(-1))[:, :length, :, 0]
            gradients.A.add_((grad_steps * inputs.dt).sum((2, 3, 4)).T.flatten())
            gradients.D.add_((out.float() * inputs.x).sum(-1).sum((2, 3, 4)).T.flatten())
            gradients.B[:, part] = _join_groups(grad_B, shape)[:, :length]
            gradients.C[:, part] = _join_groups(grad_C, shape)[:, :length]
        x, dt, B, C, A, D = gradients
        return x, dt, A, B, C, D, None, None


class _Gradients(NamedTuple):
    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    A: Tensor
    D: Tensor


def _stretches(x: Tensor, chunk_size: int) -> list[slice]:
    """Cut T positions into stretches of about `_STRETCH` positions over all rows; all but the last are whole chunks."""
    size = max(1, _STRETCH // (len(x) * chunk_size)) * chunk_size
    return [slice(start, min(start + size, x.shape[1])) for start in range(0, x.shape[1], size)]


def _pad(tensor: Tensor, chunk_size: int, value: int = 0) -> Tensor:
    """Fill [B, T, ...] up to whole chunks: dt = 0 leaves the state as it is."""
    missing = -tensor.shape[1] % chunk_size
    return F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, missing), value=value) if missing else tensor


def _chunk_ids(ids: Tensor | None, part: slice, chunk_size: int) -> tuple[Tensor, Tensor] | None:
    """Return the ids [B, c, q] of a stretch and the id [B, c] open before each of its chunks."""
    if ids is None:
        return None
    chunks = _pad(ids[:, part], chunk_size, -1).unflatten(1, (-1, chunk_size))
    first = ids[:, max(part.start - 1, 0), None]
    return chunks, torch.cat([first, chunks[:, :-1, -1]], dim=1)


def _split_heads(tensor: Tensor, groups: int, chunk_size: int) -> Tensor:
    """View [B, T, H, ...] as [R, G, B, c, q, ...]."""
    tensor = tensor.unflatten(2, (groups, -1)).unflatten(1, (-1, chunk_size))
    return tensor.permute(4, 3, 0, 1, 2, *range(5, tensor.ndim))


def _join_heads(tensor: Tensor) -> Tensor:
    """View [R, G, B, c, q, P] as [B, T, H, P]; the inverse of `_split_heads`."""
    return tensor.permute(2, 3, 4, 1, 0, 5).flatten(3, 4).flatten(1, 2)


def _heads_last(tensor: Tensor) -> Tensor:
    """View [R, G, B, c, q, ...] as [G, B, c, q, R, ...]: the heads of a group share products with B and C."""
    return tensor.movedim(0, 4)


def _heads_first(tensor: Tensor) -> Tensor:
    """View [G, B, c, q, R, ...] as [R, G, B, c, q, ...]."""
    return tensor.movedim(4, 0)


def _weigh(tensor: Tensor, decay: Tensor) -> Tensor:
    """Return a contiguous [G, B, c, q, R, P] times a decay [R, G, B, c, q], in the dtype of the tensor."""
    out = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return torch.mul(tensor, _heads_last(decay).unsqueeze(-1).to(tensor.dtype), out=out)


def _split_groups(tensor: Tensor, chunk_size: int) -> Tensor:
    """Copy [B, T, G, N] to [G x B x c, q, N]."""
    return tensor.unflatten(1, (-1, chunk_size)).permute(3, 0, 1, 2, 4).flatten(0, 2)


def _join_groups(tensor: Tensor, shape: torch.Size) -> Tensor:
    """View [G x B x c, q, N] as [B, T, G, N], given the shape [R, G, B, c, q, P]."""
    return tensor.view(*shape[1:5], -1).permute(1, 2, 3, 0, 4).flatten(1, 2)


def _lay_out(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> _Inputs:
    """Lay out one stretch."""
    groups = B.shape[2]
    x, dt, B, C = (_pad(tensor, chunk_size) for tensor in (x, dt, B, C))
    x, dt = _split_heads(x, groups, chunk_size), _split_heads(dt, groups, chunk_size)
    u = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(x, dt.unsqueeze(-1).to(x.dtype), out=u)
    return _Inputs(x, dt, u, _split_groups(B, chunk_size), _split_groups(C, chunk_size))


def _per_head(values: Tensor, groups: int, dims: int) -> Tensor:
    """View [H] as [R, G, 1, ...] with `dims` dimensions behind."""
    return values.view(groups, -1).T.reshape(-1, groups, *[1] * dims)


def _decay(dt: Tensor, A: Tensor, ids: tuple[Tensor, Tensor] | None, dtype: torch.dtype) -> _Decays:
    """Return the decays of a stretch; dt is [R, G, B, c, q].

    A running sum far below zero would leave fp32 too few digits for the differences of neighbours, so it is taken in
    fp64 and held as two fp32 numbers: nearly equal ones are subtracted without error, the rest is added after.
    """
    size = dt.shape[-1]
    exact = (dt.double() * _per_head(A, dt.shape[1], 3)).cumsum(-1)
    total = exact.float()
    rest = (exact - total).float()
    allowed = torch.ones(size, size, dtype=torch.bool, device=dt.device).tril_()
    to_end, from_start, whole = (exact[..., -1:] - exact).float().exp_(), total.exp(), total[..., -1].exp()
    if ids is not None:
        chunks, before = ids
        last = chunks[..., -1]
        allowed = (chunks.unsqueeze(-1) == chunks.unsqueeze(-2)) & allowed
        to_end *= chunks == last.unsqueeze(-1)
        from_start *= chunks == before.unsqueeze(-1)
        whole *= last == before
    # The mask comes before exp: masked differences are positive and would overflow.
    forbidden = torch.zeros(allowed.shape, device=dt.device).masked_fill_(~allowed, float("-inf"))
    inside = (total.unsqueeze(-1) - total.unsqueeze(-2)).add_(rest.unsqueeze(-1)).sub_(rest.unsqueeze(-2))
    inside = inside.add_(forbidden).exp_().to(dtype)
    return _Decays(inside, to_end, from_start, whole)


def _carry(state: Tensor | None, whole: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """Run state' = whole * state + added over the chunks.

    Args:
        state: fp32 [G, B, N, R, P] before the first chunk; None: zero.
        whole: fp32 [R, G, B, c].
        added: [G, B, c, N, R, P].

    Returns:
        (states before each chunk [G, B, c, N, R, P] in the dtype of `added`, state after the last, fp32).
    """
    before = torch.empty_like(added)
    state = added.new_zeros(before[:, :, 0].shape, dtype=torch.float32) if state is None else state
    for chunk, decay in enumerate(_chunk_decays(whole)):
        before[:, :, chunk] = state
        state = torch.addcmul(added[:, :, chunk].float(), state, decay)
    return before, state


def _carry_back(
    grad_state: Tensor | None, whole: Tensor, before: Tensor, grad_before: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `_carry`.

    Args:
        grad_state: fp32 [G, B, N, R, P] of the state after the last chunk; None: zero.
        whole: fp32 [R, G, B, c].
        before: [G, B, c, N, R, P], states before each chunk.
        grad_before: [G, B, c, N, R, P] of `before`; becomes the gradient of `added`.

    Returns:
        (gradient of `added`, of log `whole` fp32 [R, G, B, c], of the state before the first chunk, fp32).
    """
    state = before.new_zeros(before[:, :, 0].shape, dtype=torch.float32) if grad_state is None else grad_state
    grad_whole = torch.empty_like(whole)
    for chunk, decay in reversed(list(enumerate(_chunk_decays(whole)))):
        grad_whole[..., chunk] = (state * before[:, :, chunk]).sum((2, 4)).movedim(-1, 0)
        through = torch.addcmul(grad_before[:, :, chunk].float(), state, decay)
        grad_before[:, :, chunk] = state
        state = through
    return grad_before, grad_whole * whole, state


def _chunk_decays(whole: Tensor) -> tuple[Tensor, ...]:
    """Return [G, B, 1, R, 1] of each chunk from [R, G, B, c]."""
    return whole.permute(1, 2, 0, 3)[:, :, None, :, None].unbind(-1)
