"""The norms equal their definition in fp64, and from bf16 they round once, at the end."""

import pytest
import torch
from torch import Tensor

from modules.backbone.normalization import GatedGroupRMSNorm, RMSNorm
from tests.modules.helpers import assert_close

SIZE, EPSILON = 48, 1e-2


def make_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Input, gate and a weight whose steps from 1 bf16 cannot hold."""
    generator = torch.Generator().manual_seed(0)
    x, gate = (torch.randn(2, 9, SIZE, generator=generator).to(dtype) for _ in range(2))
    return x, gate, 1 + 0.01 * torch.rand(SIZE, generator=generator)


def plain(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight.double()


def gated(x: Tensor, gate: Tensor, weight: Tensor, groups: int) -> Tensor:
    product = x.double() * gate.double() * gate.double().sigmoid()
    size = SIZE // groups
    parts = [plain(product[..., start : start + size], weight[start : start + size]) for start in range(0, SIZE, size)]
    return torch.cat(parts, dim=-1)


def check(actual: Tensor, expected: Tensor) -> None:
    if actual.dtype == torch.float32:
        assert_close(actual, expected, 1e-6)
    else:
        rounded_once = (actual == expected.to(actual.dtype)).double().mean()
        assert rounded_once > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    x, _, weight = make_inputs(dtype)
    norm = RMSNorm(SIZE, EPSILON)
    with torch.no_grad():
        norm.weight.copy_(weight)
        out = norm(x)
    assert out.dtype == dtype
    check(out, plain(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gated_group_rms_norm(groups: int, dtype: torch.dtype) -> None:
    x, gate, weight = make_inputs(dtype)
    norm = GatedGroupRMSNorm(SIZE, groups, EPSILON)
    with torch.no_grad():
        norm.weight.copy_(weight)
        out = norm(x, gate)
    assert out.dtype == dtype
    check(out, gated(x, gate, weight, groups))
