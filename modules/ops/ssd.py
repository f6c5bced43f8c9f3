"""The Mamba-2 state-space scan (SSD, arXiv 2405.21060) over packed documents.

Per head, with state h in R^[P, N]:  h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,  y_t = h_t C_t + D x_t,
where dt = softplus(dt + dt_bias) in fp32, and h is zero at the start of each document.

Portable: the chunked form (`chunked_scan.py`). Fast: mamba-ssm's Triton kernel on CUDA in bf16.
Shapes: B rows, T positions, H heads, P head dim, G groups, N state.
"""

import torch.nn.functional as F
from torch import Tensor

from modules.ops.chunked_scan import chunked_scan
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
    return chunked_scan(x, dt, A, B, C, D, None if documents is None else documents.ids, chunk_size)
