"""E2M1, the 4-bit float of NVFP4: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.

Code 0 to 7 is the position on that grid, plus 8 for a negative number (-0 is code 8). Rounding saturates at +-6, as
the hardware's `cvt.satfinite` does. A NaN stays NaN as a value and becomes code 7 (+6), as the hardware has it: E2M1
holds neither NaN nor infinity, so the block scale beside it must say so.
"""

import torch
from torch import Tensor

MAX = 6.0
"""Largest number of the grid."""
GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The number of each code 0 to 7."""


def _power(magnitude: Tensor) -> Tensor:
    """Return twice the distance of neighbours on the grid, the power of two below a number: 1 below 2, 2 below 4, or 4.

    By its bits: on a CPU, comparing and choosing takes ten times as long.
    """
    return (magnitude.clamp(min=1).view(torch.int32) & 0x7F800000).view(torch.float32)


def _to_grid(magnitude: Tensor) -> Tensor:
    """Round numbers up to 8 to the grid, as if it had an 8: beside 1.5 2^22 powers, fp32 numbers are a step apart."""
    large = _power(magnitude) * (1.5 * 2**22)
    return (magnitude + large).sub_(large)


def round_nearest(v: Tensor) -> Tensor:
    """Round fp32 numbers to the nearest of the grid, ties to the even code; numbers beyond +-6 become +-6."""
    return torch.copysign(_to_grid(v.abs().clamp_(max=MAX)), v)


def round_stochastic(v: Tensor, bits: Tensor) -> Tensor:
    """Round up or down with the probability that makes the mean exact (8 bits fine, as the hardware's `cvt.rs`).

    Args:
        v: fp32 numbers; beyond +-6 they become +-6.
        bits: uint8 like `v`, uniform in 0 to 255.
    """
    magnitude = v.abs().clamp_(max=MAX)
    moved = (bits * (1 / 512)).mul_(_power(magnitude)).add_(magnitude)
    rounded = _to_grid(moved)
    down = rounded - (rounded > moved) * (_power(moved) * 0.5)
    return torch.copysign(down.clamp_(max=MAX), v)


def encode(values: Tensor) -> Tensor:
    """Return the uint8 codes (0 to 15) of numbers of the grid; a NaN becomes 7."""
    values = torch.nan_to_num(values, nan=MAX)
    magnitude = values.abs()
    place = torch.where(magnitude < 2, magnitude * 2, torch.where(magnitude < 4, magnitude + 2, magnitude / 2 + 4))
    return place.to(torch.uint8) + torch.signbit(values).to(torch.uint8) * 8


def decode(codes: Tensor) -> Tensor:
    """Return the fp32 numbers of uint8 codes (0 to 15)."""
    table = torch.tensor([*GRID, *(-number for number in GRID)], device=codes.device)
    return table[codes.int()]


def pack(codes: Tensor) -> Tensor:
    """Put two codes into a byte, the first into the low half: uint8 [..., K] -> uint8 [..., K/2]."""
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Undo `pack`: uint8 [..., K/2] -> codes uint8 [..., K]."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
