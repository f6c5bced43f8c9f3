"""The Mamba-2 state-space scan (SSD, arXiv 2405.21060) over packed documents.

Per head, with state h in R^[P, N]:  h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,  y_t = h_t C_t + D x_t,
where dt = softplus(dt + dt_bias) in fp32, and h is zero at the start of each document.

Portable: the chunked form. Inside a chunk everything is batched matmuls (C B^T once per group, never expanded to
heads); a short loop carries the states from chunk to chunk in fp32. Fast: mamba-ssm's Triton kernel on CUDA in bf16.
Shapes: B rows, T positions, H heads, P head dim, G groups, R = H / G heads per group, N state, c chunks of q positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.ops.documents import DocumentLayout
from modules.ops.kernels import ssd_kernel


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    documents: DocumentLayout | None = None,
    chunk_size: int = 64,
) -> Tensor:
    """Run the scan.

    Args:
        x: [B, T, H, P], fp32 or bf16.
        dt: [B, T, H], step sizes before bias and softplus.
        A: fp32 [H], negative.
        B: [B, T, G, N], dtype of `x`.
        C: [B, T, G, N], dtype of `x`.
        D: fp32 [H], skip weight.
        dt_bias: fp32 [H].
        documents: borders at which the state is reset; None: each row is one document.
        chunk_size: positions per chunk; changes speed and rounding only.

    Returns:
        y [B, T, H, P] in the dtype of `x`.
    """
    kernel = ssd_kernel(x)
    if kernel is not None:
        ids = None if documents is None else documents.ids
        return kernel(x, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias, dt_softplus=True, seq_idx=ids)
    dt = F.softplus(dt.float() + dt_bias)
    y = _chunked_scan(x, dt, A, B, C, None if documents is None else documents.ids, min(chunk_size, x.shape[1]))
    return (y + x.float() * D[:, None]).to(x.dtype)


def _chunked_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, ids: Tensor | None, chunk_size: int
) -> Tensor:
    """Return y [B, T, H, P] fp32 without the skip term; dt is fp32 and final."""
    batch, length, heads, channels = x.shape
    groups = B.shape[2]
    pad = -length % chunk_size
    if pad:
        x, B, C = (F.pad(tensor, (0, 0, 0, 0, 0, pad)) for tensor in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, pad))
        ids = None if ids is None else F.pad(ids, (0, pad), value=-1)
    chunks = (length + pad) // chunk_size

    def split(tensor: Tensor) -> Tensor:
        """[B, T, G x R, ...] -> [B, c, G, q, R, ...]."""
        return tensor.unflatten(2, (groups, -1)).unflatten(1, (chunks, chunk_size)).transpose(2, 3)

    dt_bcgqr = split(dt)
    decay_bcgrq = (dt_bcgqr * A.view(groups, 1, -1)).cumsum(3).transpose(3, 4)
    xdt_bcgqrp = split(x).mul(dt_bcgqr.unsqueeze(-1).to(x.dtype))
    B_bcgqn, C_bcgqn = split(B).squeeze(4), split(C).squeeze(4)
    allowed = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).tril()
    to_end, from_start, carried = decay_bcgrq[..., -1:] - decay_bcgrq, decay_bcgrq.exp(), decay_bcgrq[..., -1].exp()
    to_end = to_end.exp()
    if ids is not None:
        ids_bcq = ids.unflatten(1, (chunks, chunk_size))
        last = ids_bcq[:, :, -1]
        before = torch.cat([ids_bcq[:, :1, 0], last[:, :-1]], dim=1)
        same = (ids_bcq.unsqueeze(-1) == ids_bcq.unsqueeze(-2)) & allowed
        allowed = same[:, :, None, None]
        to_end = to_end * (ids_bcq == last.unsqueeze(-1))[:, :, None, None]
        from_start = from_start * (ids_bcq == before.unsqueeze(-1))[:, :, None, None]
        carried = carried * (last == before)[:, :, None, None]

    # Inside chunks. The mask comes before exp: masked differences are positive and would overflow.
    difference = decay_bcgrq.unsqueeze(-1) - decay_bcgrq.unsqueeze(-2)
    kernel = difference.masked_fill(~allowed, float("-inf")).exp().to(x.dtype)
    scores = (C_bcgqn @ B_bcgqn.transpose(-1, -2)).unsqueeze(3) * kernel
    xdt_bcgrqp = xdt_bcgqrp.transpose(3, 4)
    y = (scores @ xdt_bcgrqp).float()

    # Across chunks: what each chunk adds to the state, the states before each chunk, and what they give.
    weighted = (xdt_bcgqrp * to_end.transpose(3, 4).unsqueeze(-1).to(x.dtype)).flatten(4)
    added = (weighted.transpose(-1, -2) @ B_bcgqn).float().unflatten(3, (-1, channels))
    state = torch.zeros_like(added[:, 0])
    states = []
    for chunk in range(chunks):
        states.append(state)
        state = carried[:, chunk, ..., None, None] * state + added[:, chunk]
    before_bcgsn = torch.stack(states, dim=1).flatten(3, 4).to(x.dtype)
    incoming = (C_bcgqn @ before_bcgsn.transpose(-1, -2)).float().unflatten(4, (-1, channels)).transpose(3, 4)
    y = y + incoming * from_start.unsqueeze(-1)
    return y.permute(0, 1, 4, 2, 3, 5).reshape(batch, -1, heads, channels)[:, :length]
