"""The arithmetic of NVFP4's blocks in portable torch; `modules/ops/native/quantization.c` is the same in C.

Blocks of 16 lie along the last axis, so a tensor is [..., R, K/16, 16] here and its scales are [..., R, K/16].
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.ops.native.quantization import BLOCK, E4M3_MAX
from modules.precision import e2m1

FLOAT32_MAX = torch.finfo(torch.float32).max


def block_scales(scaled_maxima: Tensor) -> Tensor:
    """Return float8_e4m3fn of fp32 numbers; 0 where they are too small for it, 448 where they are too large."""
    return scaled_maxima.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)


def maxima(blocks: Tensor, tiles: bool) -> Tensor:
    """Return the largest magnitude of each block, or for each block that of its 16x16 tile."""
    folded = blocks.abs()
    for _ in range(4):  # several times as fast as `amax` of 16 numbers on a CPU
        folded = torch.maximum(*folded.chunk(2, -1))
    amax = folded.squeeze(-1)
    return _over_tiles(amax, "amax") if tiles else amax


def round_blocks(blocks: Tensor, scales: Tensor, inverse_scale: Tensor, bits: Tensor | None) -> Tensor:
    """Divide blocks by their scales and round to E2M1.

    Args:
        blocks: fp32 [..., K/16, 16].
        scales: float8_e4m3fn [..., K/16].
        inverse_scale: fp32 S, broadcasts with `scales`.
        bits: uint8 like `blocks` to round stochastically; None: to the nearest.
    """
    factor = (scales.float() * inverse_scale.reciprocal()).reciprocal().clamp(max=FLOAT32_MAX)
    scaled = blocks * factor.unsqueeze(-1)
    return e2m1.round_nearest(scaled) if bits is None else e2m1.round_stochastic(scaled, bits)


def four_over_six(
    blocks: Tensor,
    inverse_scale: Tensor,
    amax: Tensor,
    bound: float,
    tiles: bool,
    bits: Tensor | None,
    kind: Literal["mse", "mae"],
) -> tuple[Tensor, Tensor]:
    """Map each block's (tile's) largest magnitude onto 6, or onto 4 where the error is smaller that way.

    The order of operations is that of Transformer Engine, whose scales here come from `amax_b / 6 S` and whose errors
    use `amax / (6 bound)` for 1/S.

    Args:
        blocks: fp32 [..., K/16, 16].
        inverse_scale: fp32 S, broadcasts with scales.
        amax: fp32 largest magnitude of S, like `inverse_scale`.
        bound: largest block scale that S was made for.
        tiles: decide for 16x16 tiles.
        bits: uint8 like `blocks`, or None.
        kind: squared or absolute errors.

    Returns:
        (E2M1 numbers, scales) like `round_blocks` and its arguments.
    """
    six = maxima(blocks, tiles) / 6 * inverse_scale
    candidates = []
    for factor in (1.0, 1.5):
        scales = block_scales(six * factor)
        values = round_blocks(blocks, scales, inverse_scale, bits)
        scaled = values * scales.float().unsqueeze(-1) * amax.unsqueeze(-1) / (e2m1.MAX * bound)
        error = _sum_in_order(scaled - blocks, kind)
        candidates.append((values, scales, _over_tiles(error, "sum") if tiles else error))
    (values, scales, error), (others, other_scales, other_error) = candidates
    better = other_error < error
    chosen = torch.where(better, other_scales.view(torch.uint8), scales.view(torch.uint8)).view(scales.dtype)
    return torch.where(better.unsqueeze(-1), others, values), chosen


def search_scales(blocks: Tensor, inverse_scale: Tensor) -> Tensor:
    """Return the scales with the smallest squared errors among all E4M3 numbers, those of the maxima among equals."""

    def error(scales: Tensor) -> Tensor:
        values = round_blocks(blocks, scales, inverse_scale, None)
        return _sum_in_order(values * (scales.float() / inverse_scale).unsqueeze(-1) - blocks, "mse")

    best = block_scales(maxima(blocks, tiles=False) * (inverse_scale * (1 / 6))).view(torch.uint8)
    least = error(best.view(torch.float8_e4m3fn))
    for byte in range(1, 127):
        candidate = torch.full_like(best, byte)
        other = error(candidate.view(torch.float8_e4m3fn))
        best = torch.where(other < least, candidate, best)
        least = torch.where(other < least, other, least)
    return best.view(torch.float8_e4m3fn)


def _sum_in_order(differences: Tensor, kind: Literal["mse", "mae"]) -> Tensor:
    """Sum squares or absolute values of each block, from the first to the last."""
    errors = differences * differences if kind == "mse" else differences.abs()
    total = torch.zeros_like(errors[..., 0])
    for column in errors.unbind(-1):
        total = total + column
    return total


def _over_tiles(rows: Tensor, reduction: Literal["amax", "sum"]) -> Tensor:
    """Reduce [..., R, K/16] over every 16 rows (the last ones may be fewer) and give each row the result."""
    count = rows.shape[-2]
    padded = F.pad(rows, (0, 0, 0, -count % BLOCK)).unflatten(-2, (-1, BLOCK))
    if reduction == "amax":
        reduced = padded.amax(-2, keepdim=True)
    else:
        reduced = padded
        for half in (8, 4, 2, 1):
            reduced = reduced[..., :half, :] + reduced[..., half:, :]
    return reduced.expand_as(padded).flatten(-3, -2)[..., :count, :]
