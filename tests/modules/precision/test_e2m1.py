"""E2M1 numbers against the nearest of the grid by brute force, and known codes."""

import pytest
import torch

from modules.precision import e2m1

GRID = torch.tensor(e2m1.GRID)


def test_nearest_equals_brute_force():
    v = torch.cat((torch.linspace(-7, 7, 20001), torch.randn(1000) * 3))
    distances = (v.abs().clamp(max=6).unsqueeze(1) - GRID).abs()
    even_first = [0, 2, 4, 6, 1, 3, 5, 7]  # of two at the same distance, the one with the even code
    place = torch.tensor(even_first)[distances[:, even_first].argmin(1)]
    assert torch.equal(e2m1.round_nearest(v), torch.copysign(GRID[place], v))


def test_ties_go_to_the_even_code_and_large_numbers_saturate():
    v = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 9, float("inf"), 1e-45, -0.25, -float("inf")])
    expected = torch.tensor([0, 1, 1, 2, 2, 4, 4, 6, 6, 0, -0.0, -6])
    assert torch.equal(e2m1.round_nearest(v), expected)
    assert torch.equal(e2m1.round_nearest(v).signbit(), expected.signbit())


def test_every_code_survives():
    codes = torch.arange(16, dtype=torch.uint8)
    values = e2m1.decode(codes)
    assert values.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert torch.equal(e2m1.encode(values), codes)
    assert torch.equal(e2m1.round_nearest(values), values)
    assert e2m1.encode(torch.tensor([float("nan")])).item() == 7


def test_the_first_of_two_codes_is_the_low_half():
    assert e2m1.pack(torch.tensor([1, 2, 15, 0], dtype=torch.uint8)).tolist() == [0x21, 0x0F]
    codes = torch.randint(16, (3, 5, 32), dtype=torch.uint8)
    assert torch.equal(e2m1.unpack(e2m1.pack(codes)), codes)


def test_stochastic_rounding_has_the_right_mean_over_all_bits():
    v = torch.cat((torch.linspace(-6, 6, 481), torch.tensor([1.9, 3.9, 5.99, -1.99])))
    bits = torch.arange(256, dtype=torch.uint8)
    rounded = e2m1.round_stochastic(v.unsqueeze(1).expand(-1, 256), bits.expand(len(v), 256))
    assert torch.isin(rounded.abs(), GRID).all()
    # neighbours only, and as often as the fraction says, 1/256 of a step fine
    step = torch.where(v.abs() < 2, 0.5, torch.where(v.abs() < 4, 1.0, 2.0))
    assert ((rounded - v.unsqueeze(1)).abs() < step.unsqueeze(1)).all()
    assert ((rounded.mean(1) - v).abs() <= step / 256 + 1e-6).all()


def test_stochastic_rounding_saturates():
    v = torch.tensor([6.0, 7.0, -9.0, 0.0])
    for bit in (0, 255):
        bits = torch.full((4,), bit, dtype=torch.uint8)
        assert e2m1.round_stochastic(v, bits).tolist() == [6, 6, -6, 0]


@pytest.mark.parametrize("number", e2m1.GRID)
def test_numbers_of_the_grid_are_never_moved(number):
    bits = torch.arange(256, dtype=torch.uint8)
    assert (e2m1.round_stochastic(torch.full((256,), number), bits) == number).all()
