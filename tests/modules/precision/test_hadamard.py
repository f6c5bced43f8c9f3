"""The random Hadamard transform against its matrix and known rows."""

import pytest
import torch

from modules.ops.native import quantization as native
from modules.precision.hadamard import rotate
from tests.modules.helpers import hadamard_matrix


@pytest.fixture(params=["native", "portable"], autouse=True)
def _path(request, monkeypatch):
    """Every test runs in C and in torch."""
    if request.param == "portable":
        monkeypatch.setattr(native, "applies", lambda x: False)
    elif native.load()[0] is None:
        pytest.skip(native.load()[1])


def test_known_rows():
    matrix = hadamard_matrix()
    assert (4 * matrix[0]).tolist() == [1] * 16
    assert (4 * matrix[3]).tolist() == [-1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1]
    assert torch.equal(matrix @ matrix.T, torch.eye(16))
    expected = [-14.5, -7.5, 6.5, -0.5, 6.5, -0.5, -14.5, 8.5, 7.5, 14.5, 0.5, 1.5, 0.5, -2.5, 9.5, -15.5]
    assert rotate(torch.arange(16.0)).tolist() == expected


@pytest.mark.parametrize("axis", [-1, -2])
def test_rotation_is_the_product_with_the_matrix(axis):
    x = torch.randn(3, 32, 48)
    turned = x.transpose(axis, -1)
    expected = (turned.double().unflatten(-1, (-1, 16)) @ hadamard_matrix().double()).flatten(-2).transpose(axis, -1)
    torch.testing.assert_close(rotate(x, axis), expected.float(), rtol=1e-6, atol=1e-6)


def test_a_product_of_rotated_operands_is_the_product():
    g, x = torch.randn(64, 5, dtype=torch.float64).float(), torch.randn(64, 7)
    torch.testing.assert_close(rotate(g, -2).T @ rotate(x, -2), g.T @ x, rtol=1e-5, atol=1e-5)


def test_bf16_is_rounded_once():
    x = torch.randn(4, 64).bfloat16()
    assert torch.equal(rotate(x), rotate(x.float()).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "axis"), [((3, 32, 50), -2), ((3, 21, 48), -1), ((64,), -1), ((32, 7), -2)])
def test_both_ways_have_the_same_bits(shape, axis, dtype, monkeypatch):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3).to(dtype)
    x.view(-1)[:20] = 0
    found = rotate(x, axis)
    monkeypatch.setattr(native, "applies", lambda x: False)
    assert torch.equal(found, rotate(x, axis))
    assert found.shape == x.shape
