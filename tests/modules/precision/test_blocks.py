"""The C code and the portable operations give the same bits, whatever the options, shapes and threads."""

import itertools

import pytest
import torch

from modules.ops.native import library, quantization
from modules.ops.native.quantization import Options
from modules.precision import fp8, mxfp8, nvfp4
from modules.precision.formats import tensor_amax

SHAPES = [(32,), (32, 48), (20, 32), (48, 21), (3, 16, 32), (2, 16, 21), (2, 2, 16, 16)]
OPTIONS = list(itertools.product((False, True), ("nearest", "stochastic"), (None, "mse", "mae"), (False, True)))


@pytest.fixture(autouse=True)
def _library():
    if quantization.load()[0] is None:
        pytest.skip(quantization.load()[1])


def both(function, monkeypatch):
    """The results in C and in portable operations, with the same random bits."""
    torch.manual_seed(1)
    native = function()
    with monkeypatch.context() as patch:
        patch.setattr(quantization, "applies", lambda x: False)
        torch.manual_seed(1)
        return native, function()


def bits(result):
    """Every tensor of a result as whole numbers; NaN is one number."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    tensors = result if isinstance(result, tuple) else (result,)
    numbers = [torch.nan_to_num(t.float(), nan=-7.7) if t.is_floating_point() else t for t in tensors]
    return [(t.dtype, n.view(whole[n.element_size()])) for t, n in zip(tensors, numbers, strict=True)]


def assert_same_bits(native, portable):
    for (dtype, mine), (other_dtype, theirs) in zip(bits(native), bits(portable), strict=True):
        assert dtype == other_dtype
        assert torch.equal(mine, theirs)


def special_numbers(shape, dtype):
    x = torch.randn(shape) * torch.exp(2 * torch.randn(shape))
    x.view(-1)[::7] = 0
    x.view(-1)[1::11] = -0.0
    x.view(-1)[5] = 1e-40
    x.view(-1)[9] *= 1e-30
    if len(shape) > 1:
        x[..., -1, :] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_option(shape, dtype, monkeypatch):
    x = special_numbers(shape, dtype)
    for tiles, rounding, four, hadamard in OPTIONS:
        for axis in (-1, -2)[: len(shape)]:
            if shape[axis] % 16 or (tiles and len(shape) == 1):
                continue
            options = {
                "tiles": tiles, "rounding": rounding, "four_over_six": four, "hadamard": hadamard, "axis": axis,
                "stacked": len(shape) == 3,
            }  # fmt: skip
            assert_same_bits(*both(lambda o=options: nvfp4.quantize(x, Options(**o)), monkeypatch))
            assert_same_bits(*both(lambda o=options: nvfp4.quantize_dequantize(x, Options(**o)), monkeypatch))
            if four is None:
                assert_same_bits(*both(lambda o=options: nvfp4.gemm_operand(x, Options(**o), True), monkeypatch))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-45, 3.4e38])
def test_extreme_numbers(value, monkeypatch):
    for dtype, amax, four in itertools.product((torch.float32, torch.bfloat16), (None, 3.0), (None, "mse")):
        x = torch.randn(32, 48).to(dtype)
        x[3, 7] = value
        options = {"amax": None if amax is None else torch.tensor(amax), "four_over_six": four}
        for function in (nvfp4.quantize, nvfp4.quantize_dequantize):
            assert_same_bits(*both(lambda f=function, x=x, o=options: f(x, Options(**o)), monkeypatch))


@pytest.mark.parametrize("payload", [0x7F800001, 0x7FFFFFFF, -1, -0x3FFFFF])
def test_nan_of_any_bits_stays_nan(payload):
    x = torch.ones(16)
    x[2] = torch.tensor(payload, dtype=torch.int32).view(torch.float32)
    assert nvfp4.quantize_dequantize(x).isnan().all()
    assert nvfp4.gemm_operand(x)[0].isnan().all()


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 3e38])
def test_extreme_tensors(size, monkeypatch):
    x = torch.linspace(-1, 1, 1024).view(32, 32) * size
    for function in (nvfp4.quantize, nvfp4.quantize_dequantize):
        assert_same_bits(*both(lambda f=function: f(x), monkeypatch))


def test_searches_and_given_scales(monkeypatch):
    x = special_numbers((2, 20, 48), torch.float32)
    scales, portable = both(lambda: nvfp4.mse_scales(x, Options(stacked=True)), monkeypatch)
    assert_same_bits(scales, portable)
    assert_same_bits(*both(lambda: nvfp4.quantize(x, Options(scales=scales, stacked=True)), monkeypatch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(64,), (32, 64), (33, 96), (64, 37), (2, 32, 21), (3, 48, 64)], ids=str)
def test_eight_bits(shape, dtype, monkeypatch):
    x = special_numbers(shape, dtype)
    for axis in (-1, -2)[: len(shape)]:
        if shape[axis] % 32 == 0:
            assert_same_bits(*both(lambda a=axis: mxfp8.quantize_dequantize(x, axis=a), monkeypatch))
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        own, frozen = tensor_amax(x, stacked=len(shape) == 3), torch.tensor(0.7)
        for scale in (fp8.inverse_scale_of(amax, kind) for amax in (own, frozen)):
            assert_same_bits(*both(lambda s=scale, k=kind: fp8.quantize_dequantize(x, s, k), monkeypatch))
            assert_same_bits(*both(lambda s=scale, k=kind: fp8.gemm_operand(x, s, k)[0], monkeypatch))
    if len(shape) == 2:
        rows = fp8.inverse_scale_of(x.abs().amax(1).float())
        assert_same_bits(*both(lambda: fp8.quantize_dequantize(x, rows), monkeypatch))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-45, 3.4e38])
def test_extreme_numbers_in_eight_bits(value, monkeypatch):
    for dtype, size in itertools.product((torch.float32, torch.bfloat16), (1e-42, 1e-38, 1.0)):
        x = (torch.randn(33, 64) * size).to(dtype)
        x[3, 7] = value
        assert_same_bits(*both(lambda x=x: mxfp8.quantize_dequantize(x), monkeypatch))
        scale = fp8.inverse_scale_of(tensor_amax(x))
        assert_same_bits(*both(lambda x=x, s=scale: fp8.quantize_dequantize(x, s), monkeypatch))


def test_scales_of_rows(monkeypatch):
    x = torch.randn(20, 48)
    for options in ({}, {"four_over_six": "mae"}):
        given = Options(amax=x.abs().amax(1), **options)
        assert_same_bits(*both(lambda o=given: nvfp4.quantize_dequantize(x, o), monkeypatch))


def test_many_threads_give_the_same_bits():
    x = torch.randn(520, 512)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            generator = torch.Generator().manual_seed(0)
            options = Options(rounding="stochastic", generator=generator, hadamard=True)
            results.append(nvfp4.quantize_dequantize(x, options))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_other_tensors_take_the_portable_operations():
    assert quantization.applies(torch.ones(16))
    assert quantization.applies(torch.nn.Parameter(torch.ones(16)))
    assert not quantization.applies(torch.ones(16, dtype=torch.float16))
    assert not quantization.applies(torch.ones(16, device="meta"))
    assert not quantization.applies(torch.ones(0, 16))
    assert nvfp4.quantize_dequantize(torch.randn(16, 16).half()).dtype == torch.float16


def test_without_a_compiler_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    assert quantization.load.__wrapped__() == (None, "no C compiler")


def test_no_gradient_passes():
    x = torch.randn(16, 16, requires_grad=True)
    assert not nvfp4.quantize_dequantize(x).requires_grad
