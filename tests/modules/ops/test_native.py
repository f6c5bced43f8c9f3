"""The C code's products equal torch's; compiled once, and absent without a compiler."""

import pytest
import torch

from modules.ops import native
from modules.ops.native import library
from modules.precision import fp8, nvfp4
from tests.modules.helpers import assert_close


@pytest.fixture(autouse=True)
def _inference():
    if native.load()[0] is None:
        pytest.skip(native.load()[1])
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64])
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (16, 16), (37, 45), (130, 100)], ids=str)
def test_product_of_few_rows(rows, size, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype))
    x = torch.randn(rows, size[1], generator=generator).to(dtype)
    assert native.applies(x, weight)
    exact = x.double() @ weight.double().T
    assert_close(native.few_rows_linear(x, weight), exact.to(dtype), 1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("rows", [1, 3, 9, 40])
@pytest.mark.parametrize(("format", "size"), [("nvfp4", 16), ("nvfp4", 304), ("fp8", 16), ("fp8", 45)])
def test_inputs_are_rounded_as_elsewhere(rows: int, size: int, format) -> None:
    """Bit for bit: an identity as the weight shows them."""
    generator = torch.Generator().manual_seed(0)
    magnitudes = torch.rand(rows, size, generator=generator) * 40 - 30
    x = torch.randn(rows, size, generator=generator) * torch.exp2(magnitudes)
    x[0, : size // 2], x[-1, -2:] = 0, 1e30
    x, inverse_scale = x.bfloat16(), torch.tensor([3.7])
    options = nvfp4.Options(inverse_scale=inverse_scale[0])
    wanted = nvfp4.gemm_operand(x, options)[0] if format == "nvfp4" else fp8.gemm_operand(x, inverse_scale[0])[0]
    identity = torch.nn.Parameter(torch.eye(size).bfloat16())
    found = native.few_rows_linear(x, identity, native.Operands(format, inverse_scale, None))
    assert torch.equal(found, wanted.float())
    assert found.abs().amax() == (6 * 448 if format == "nvfp4" else 448)
    factors = torch.tensor([0.3])
    found = native.few_rows_linear(x, identity, native.Operands(format, inverse_scale, factors))
    assert torch.equal(found, (wanted.float() * 0.3).bfloat16().float())


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 100), (16, 8192)], ids=str)
def test_largest_is_argmax(shape):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(native.largest(scores), scores.argmax(-1))
    scores[..., shape[-1] // 2 :] = scores.amax(-1, keepdim=True)
    assert torch.equal(native.largest(scores), (scores == scores.amax(-1, keepdim=True)).int().argmax(-1))


def test_many_threads_give_the_same_product():
    weight, x = torch.nn.Parameter(torch.randn(4096, 256)), torch.randn(24, 256)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(native.few_rows_linear(x, weight))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_gradients_and_many_rows_are_torchs_business():
    weight = torch.nn.Parameter(torch.randn(8, 4))
    assert not native.applies(torch.randn(native.MOST_ROWS + 1, 4), weight)
    with torch.inference_mode(False), torch.enable_grad():
        assert not native.applies(torch.randn(1, 4), weight)


def test_the_process_keeps_its_subnormal_numbers():
    tiny = torch.tensor([1e-40])
    native.few_rows_linear(torch.ones(1, 1), torch.nn.Parameter(torch.ones(1, 1)))
    assert (tiny * 0.5).item() > 0


def test_without_a_compiler_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    assert native.load.__wrapped__() == (None, "no C compiler")


def test_a_compiler_that_fails_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "COMPILE", ("--no-such-option",))
    loaded, reason = native.load.__wrapped__()
    assert loaded is None
    assert "failed" in reason
