"""NVFP4: known codes, errors, zeros and what is no number, tiles, experts, stochastic rounding, scale searches."""

import pytest
import torch

from modules.errors import UserError
from modules.ops.native.quantization import Options
from modules.precision import e2m1, fp8, mxfp8, nvfp4
from tests.modules.helpers import dequantize_nvfp4

TIES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6])


def packed(quantized):
    return e2m1.pack(quantized.codes).tolist()


def scale_bytes(quantized):
    return quantized.scales.view(torch.uint8).tolist()


def relative_error(x, **options):
    """Mean squared error over mean square."""
    left = nvfp4.quantize_dequantize(x, Options(**options))
    return ((left - x).square().sum() / x.square().sum()).item()


@pytest.fixture(params=["native", "portable"], autouse=True)
def _path(request, monkeypatch):
    """Every test runs in C and in torch."""
    if request.param == "portable":
        monkeypatch.setattr(nvfp4.native, "applies", lambda x: False)
    elif nvfp4.native.load()[0] is None:
        pytest.skip(nvfp4.native.load()[1])


def test_the_grid_is_kept():
    grid = torch.tensor([*e2m1.GRID, *(-number for number in e2m1.GRID)])
    quantized = nvfp4.quantize(grid)
    assert packed(quantized) == [16, 50, 84, 118, 152, 186, 220, 254]
    assert scale_bytes(quantized) == [126]
    left = dequantize_nvfp4(quantized)
    assert torch.equal(left, grid)
    assert torch.equal(left.signbit(), grid.signbit())


def test_ties():
    assert packed(nvfp4.quantize(torch.cat((TIES, -TIES)))) == [32, 66, 100, 118, 168, 202, 236, 254]


def test_two_blocks():
    numbers = torch.arange(1.0, 17)
    quantized = nvfp4.quantize(torch.cat((numbers, 0.01 * numbers)))
    assert 1 / quantized.inverse_scale.item() == pytest.approx(0.00595238, rel=1e-6)
    assert quantized.scales.float().tolist() == [448, 4.5]
    assert packed(quantized) == [33, 50, 68, 85, 101, 102, 118, 119, 17, 50, 68, 85, 101, 102, 118, 119]


def test_known_matrix():
    x = torch.tensor([(37 * i % 101 - 50) / 16 for i in range(64)]).view(2, 32)
    quantized = nvfp4.quantize(x)
    assert quantized.inverse_scale.item() == pytest.approx(860.16)
    assert scale_bytes(quantized) == [[126, 126], [125, 126]]
    assert packed(quantized) == [
        [191, 229, 105, 46, 199, 244, 90, 14, 214, 114, 76, 175, 230, 97, 61, 183],
        [245, 105, 46, 215, 244, 91, 142, 230, 114, 76, 175, 229, 96, 61, 199, 245],
    ]
    assert relative_error(x) == pytest.approx(0.0108428, abs=1e-7)
    frozen = nvfp4.quantize(x, Options(amax=torch.tensor(1.0)))
    assert scale_bytes(frozen) == [[126, 126], [126, 126]]
    assert dequantize_nvfp4(frozen).abs().max() == 1
    assert nvfp4.quantize(torch.full((16,), 2688.0)).inverse_scale == 1


def test_error_of_normal_numbers():
    x = torch.randn(512, 1024)
    assert relative_error(x) == pytest.approx(0.00904, abs=1e-4)
    assert relative_error(x, tiles=True) == pytest.approx(0.0124, abs=2e-4)
    assert relative_error(x, four_over_six="mse") == pytest.approx(0.00756, abs=1e-4)
    assert relative_error(x, four_over_six="mae") == pytest.approx(0.00780, abs=1e-4)


def test_all_ways_out_say_the_same():
    for options in ({}, {"tiles": True}, {"axis": -2, "hadamard": True}, {"four_over_six": "mae"}):
        x = torch.randn(48, 64)
        quantized = nvfp4.quantize(x, Options(**options))
        left = nvfp4.quantize_dequantize(x, Options(**options))
        assert torch.equal(dequantize_nvfp4(quantized).transpose(options.get("axis", -1), -1), left)
        values, decode, _ = nvfp4.gemm_operand(x, Options(**options))
        assert values.dtype == torch.bfloat16
        torch.testing.assert_close(values.float() * decode, left, rtol=3e-7, atol=0)
        exact = e2m1.decode(quantized.codes) * quantized.scales.float().repeat_interleave(16, -1)
        assert torch.equal(values.float(), exact.transpose(options.get("axis", -1), -1))


def test_bf16_in_and_out():
    x = torch.randn(32, 64).bfloat16()
    left = nvfp4.quantize_dequantize(x)
    assert left.dtype == torch.bfloat16
    assert torch.equal(left, nvfp4.quantize_dequantize(x.float()).bfloat16())


# ------------------------------------------------------------------------- zeros, tiny numbers, what is no number


def test_zeros_stay_zeros():
    for options in ({}, {"tiles": True}, {"four_over_six": "mse"}, {"rounding": "stochastic"}, {"hadamard": True}):
        left = nvfp4.quantize_dequantize(torch.zeros(32, 32), Options(**options))
        assert torch.equal(left, torch.zeros(32, 32))
    quantized = nvfp4.quantize(torch.zeros(16))
    assert quantized.inverse_scale == 1
    assert scale_bytes(quantized) == [0]


def test_blocks_that_are_small_beside_the_largest():
    x = torch.cat((torch.full((16,), 100.0), torch.full((16,), 1e-7), torch.zeros(16)))
    quantized = nvfp4.quantize(x)
    assert scale_bytes(quantized)[1:] == [0, 0]
    left = dequantize_nvfp4(quantized)
    assert left[:16].tolist() == pytest.approx([100] * 16)
    assert torch.equal(left[16:], torch.zeros(32))


@pytest.mark.parametrize("size", [1e-44, 1e-39, 1e-37, 1e-30, 1e30, 3.4e38])
def test_any_size(size):
    x = torch.linspace(-1, 1, 64) * size
    left = nvfp4.quantize_dequantize(x)
    assert left.isfinite().all()
    if size > 1e-34:  # below, FLT_MAX is not factor enough
        assert ((left - x).abs() <= size / 6 * 1.07).all()
    else:
        assert (left.abs() <= 1.2 * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_is_not_hidden(dtype):
    x = torch.randn(32, 32).to(dtype)
    x[3, 7] = float("nan")
    assert nvfp4.quantize_dequantize(x).isnan().all()
    frozen = nvfp4.quantize_dequantize(x, Options(amax=torch.tensor(5.0)))
    expected = torch.zeros(32, 32, dtype=torch.bool)
    expected[3, :16] = True
    assert torch.equal(frozen.isnan(), expected)
    values, *_ = nvfp4.gemm_operand(x, Options(amax=torch.tensor(5.0)))
    assert torch.equal(values.isnan(), expected)
    assert nvfp4.quantize(x).scales.float().isnan().all()
    tile = nvfp4.quantize_dequantize(x, Options(amax=torch.tensor(5.0), tiles=True)).isnan()
    assert tile[:16, :16].all()
    assert tile.sum() == 256
    assert nvfp4.quantize_dequantize(x, Options(amax=torch.tensor(5.0), four_over_six="mse")).isnan()[3, :16].all()


def test_infinity_saturates():
    x = torch.ones(2, 16)
    x[0, 5], x[0, 6] = float("inf"), -float("inf")
    left = nvfp4.quantize_dequantize(x)
    assert left[0, 5:7].tolist() == [2688, -2688]
    assert left[0, 0] == 0
    assert torch.equal(left[1], torch.full((16,), 6 * 0.171875))  # S = 1: the scale is E4M3 of 1 / 6
    frozen = nvfp4.quantize_dequantize(x, Options(amax=torch.tensor(3.0)))
    assert frozen[0, 5:7].tolist() == [3, -3]


def test_lengths_must_be_whole_blocks():
    with pytest.raises(UserError, match="16"):
        nvfp4.quantize(torch.zeros(4, 24))
    with pytest.raises(UserError, match="16"):
        nvfp4.quantize_dequantize(torch.zeros(24, 16), Options(axis=-2))


# ------------------------------------------------------------------------------------------- tiles, axes, experts


def test_tiles_and_transposition_may_be_exchanged():
    x = torch.randn(48, 64)
    for options in ({}, {"four_over_six": "mse"}):
        if not options:
            left = nvfp4.quantize_dequantize(x, Options(tiles=True))
            assert torch.equal(nvfp4.quantize_dequantize(x.T.contiguous(), Options(tiles=True)).T, left)
        scales = nvfp4.quantize(x, Options(tiles=True, **options)).scales.float()
        assert torch.equal(scales, scales[::16].repeat_interleave(16, 0))


def test_the_last_tile_may_be_smaller():
    x = torch.randn(20, 32)
    padded = torch.cat((x, torch.zeros(12, 32)))
    tiles = Options(tiles=True)
    assert torch.equal(nvfp4.quantize_dequantize(x, tiles), nvfp4.quantize_dequantize(padded, tiles)[:20])


@pytest.mark.parametrize("shape", [(32, 40), (2, 48, 21)], ids=str)
def test_the_other_axis_is_the_transposed_tensor(shape):
    x = torch.randn(shape)
    for options in ({}, {"hadamard": True}, {"four_over_six": "mse"}):
        turned = nvfp4.quantize_dequantize(x.mT.contiguous(), Options(**options))
        assert torch.equal(nvfp4.quantize_dequantize(x, Options(axis=-2, **options)), turned.mT)


def test_a_strided_tensor():
    x = torch.randn(64, 32)
    assert torch.equal(nvfp4.quantize_dequantize(x.T), nvfp4.quantize_dequantize(x.T.contiguous()))


def test_a_scale_per_expert_is_the_scale_of_each_expert():
    x = torch.randn(3, 20, 32) * torch.tensor([1, 100, 0.01]).view(3, 1, 1)
    for options in ({}, {"tiles": True}, {"four_over_six": "mae"}):
        each = torch.stack([nvfp4.quantize_dequantize(expert, Options(**options)) for expert in x])
        assert torch.equal(nvfp4.quantize_dequantize(x, Options(stacked=True, **options)), each)
        amax = x.abs().amax((1, 2))
        assert torch.equal(nvfp4.quantize_dequantize(x, Options(amax=amax, **options)), each)
    assert nvfp4.quantize(x, Options(stacked=True)).inverse_scale.shape == (3,)


def test_a_scale_per_row():
    x = torch.randn(40, 32) * torch.exp(torch.randn(40, 1))
    each = torch.stack([nvfp4.quantize_dequantize(row) for row in x])
    assert torch.equal(nvfp4.quantize_dequantize(x, Options(amax=x.abs().amax(1))), each)


# ------------------------------------------------------------------------------------------- stochastic rounding


def test_stochastic_rounding_averages_to_the_tensor():
    x = torch.randn(256, 256)
    generator = torch.Generator().manual_seed(3)
    options = Options(rounding="stochastic", generator=generator)
    draws = sum(nvfp4.quantize_dequantize(x, options) for _ in range(50)) / 50
    error = ((draws - x).square().mean() / x.square().mean()).sqrt().item()
    assert error == pytest.approx(0.0219, abs=1e-3)
    assert relative_error(x) ** 0.5 == pytest.approx(0.0949, abs=1e-3)


def test_a_generator_decides_alone():
    x = torch.randn(64, 64)
    first, again, other = (
        nvfp4.quantize_dequantize(x, Options(rounding="stochastic", generator=torch.Generator().manual_seed(seed)))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_random_bits_are_uniform():
    bits = nvfp4.random_bits(torch.empty(1000, 1003), torch.Generator().manual_seed(0))
    counts = bits.flatten().bincount(minlength=256)
    assert bits.shape == (1000, 1003)
    assert (counts - counts.float().mean()).abs().max() < 6 * counts.float().mean().sqrt()


# ------------------------------------------------------------------------------------------------ scale searches


def test_searched_scales_are_the_best_there_are():
    x = torch.randn(4, 32)
    scales = nvfp4.mse_scales(x)
    encode = nvfp4.quantize(x).inverse_scale
    assert relative_error(x, scales=scales) < relative_error(x, four_over_six="mse") < relative_error(x)
    blocks = x.unflatten(-1, (-1, 16)).double()
    best = torch.full(scales.shape, float("inf"), dtype=torch.float64)
    for byte in range(1, 127):
        step = torch.tensor(byte, dtype=torch.uint8).view(torch.float8_e4m3fn).double() / encode
        left = e2m1.round_nearest((blocks / step).float()).double() * step
        best = torch.minimum(best, (left - blocks).square().sum(-1))
    chosen = (nvfp4.quantize_dequantize(x, Options(scales=scales)).unflatten(-1, (-1, 16)) - blocks).square().sum(-1)
    torch.testing.assert_close(chosen, best, rtol=1e-4, atol=0)


def test_given_scales_are_taken():
    x = torch.randn(2, 16)
    scales = torch.tensor([[448.0], [224.0]]).to(torch.float8_e4m3fn)
    quantized = nvfp4.quantize(x, Options(amax=torch.tensor(4.0), scales=scales))
    assert torch.equal(quantized.scales.float(), scales.float())
    step = scales.float() / (2688 / 4)
    torch.testing.assert_close(dequantize_nvfp4(quantized), e2m1.round_nearest(x / step) * step)


def test_a_zero_block_keeps_its_scale_in_a_search():
    x = torch.cat((torch.zeros(16), torch.randn(16)))
    assert nvfp4.mse_scales(x).float()[0] == 0


def test_four_over_six_takes_four_in_almost_half_of_the_blocks():
    x = torch.randn(512, 512)
    quantized = nvfp4.quantize(x, Options(four_over_six="mse"))
    blocks = x.abs().unflatten(-1, (-1, 16)).amax(-1)
    four = quantized.scales.float() > 1.2 * blocks / 6 * quantized.inverse_scale
    assert four.float().mean() == pytest.approx(0.45, abs=0.02)
    assert quantized.inverse_scale == 6 * 256 / x.abs().max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_bits():
    for dtype in (torch.float32, torch.bfloat16):
        x = (torch.randn(48, 64) * torch.exp(torch.randn(48, 1))).to(dtype)
        for options in ({}, {"tiles": True}, {"axis": -2, "hadamard": True}, {"four_over_six": "mse"}):
            here, there = nvfp4.quantize(x, Options(**options)), nvfp4.quantize(x.cuda(), Options(**options))
            assert torch.equal(here.codes, there.codes.cpu())
            assert torch.equal(here.scales.view(torch.uint8), there.scales.view(torch.uint8).cpu())
            for function in (nvfp4.quantize_dequantize, lambda *given: nvfp4.gemm_operand(*given)[0]):
                assert torch.equal(function(x, Options(**options)), function(x.cuda(), Options(**options)).cpu())
        for function in (mxfp8.quantize_dequantize, fp8.quantize_dequantize):
            assert torch.equal(function(x), function(x.cuda()).cpu())
