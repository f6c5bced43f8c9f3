"""Fast kernels: what is detected, and that on CUDA every operation equals the portable one on the CPU."""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from modules.ops import kernels
from modules.ops.attention import attention
from modules.ops.convolution import causal_convolution
from modules.ops.cross_entropy import linear_cross_entropy
from modules.ops.documents import DocumentLayout
from modules.ops.experts import grouped_linear
from modules.ops.ssd import ssd
from tests.modules.helpers import assert_close, document_ids

IDS = document_ids([5, 70, 53], [128])
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 3e-2}
"""TF32 may be used for fp32 products inside a kernel."""

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def run_attention(device: str, dtype: torch.dtype) -> tuple[Callable, list[Tensor]]:
    layout = DocumentLayout(IDS.to(device))
    inputs = [normal(2, 128, heads, 64, dtype=dtype) for heads in (4, 2, 2)]
    return lambda query, key, value: attention(query, key, value, layout), inputs


def run_ssd(device: str, dtype: torch.dtype) -> tuple[Callable, list[Tensor]]:
    layout = DocumentLayout(IDS.to(device))
    inputs = [normal(2, 128, 4, 64, dtype=dtype), normal(2, 128, 4, dtype=dtype), -normal(4).exp()]
    inputs += [normal(2, 128, 2, 32, dtype=dtype), normal(2, 129, 2, 32, dtype=dtype)[:, 1:], normal(4), normal(4)]
    return lambda *tensors: ssd(*tensors, documents=layout, chunk_size=64), inputs


def run_convolution(device: str, dtype: torch.dtype) -> tuple[Callable, list[Tensor]]:
    layout = DocumentLayout(IDS.to(device))
    return lambda *tensors: causal_convolution(*tensors, layout), [
        normal(2, 128, 48, dtype=dtype),
        normal(48, 4),
        normal(48),
    ]


def run_experts(device: str, dtype: torch.dtype) -> tuple[Callable, list[Tensor]]:
    offsets = torch.tensor([0, 10, 10, 40], dtype=torch.int32, device=device)
    return lambda x, weight: grouped_linear(x, weight, offsets), [
        normal(40, 64, dtype=dtype),
        normal(4, 32, 64, dtype=dtype),
    ]


def run_cross_entropy(device: str, dtype: torch.dtype) -> tuple[Callable, list[Tensor]]:
    labels = torch.arange(40, device=device)
    weights = torch.linspace(0, 1, 40, device=device)
    return lambda hidden, weight: linear_cross_entropy(hidden, weight, labels, weights)[0], [
        normal(40, 64, dtype=dtype),
        normal(100, 64, dtype=dtype),
    ]


OPERATIONS = [run_attention, run_ssd, run_convolution, run_experts, run_cross_entropy]


def results(operation: Callable, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Result and gradients of an operation on a device, brought to the CPU."""
    function, inputs = operation(device, dtype)
    leaves = [tensor.to(device).requires_grad_() for tensor in inputs]
    out = function(*leaves)
    probe = normal(*out.shape).to(device) if out.ndim else 1.0
    return [tensor.detach().float().cpu() for tensor in (out, *torch.autograd.grad((out * probe).sum(), leaves))]


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__.removeprefix("run_"))
def test_cuda_equals_the_portable_version(operation: Callable, dtype: torch.dtype) -> None:
    for actual, expected in zip(results(operation, "cuda", dtype), results(operation, "cpu", dtype), strict=True):
        assert_close(actual, expected, TOLERANCE[dtype])


@pytest.fixture
def fresh_detection():
    kernels._load.cache_clear()
    yield
    kernels._load.cache_clear()


def test_without_cuda_nothing_is_active_and_the_table_says_why(fresh_detection, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.ssd_kernel() is None
    assert kernels.varlen_attention_kernel() is None
    assert {reason for *_, reason in kernels.kernel_table()} == {"no CUDA device"}


def test_a_kernel_that_does_not_import_is_a_reason_and_no_error(fresh_detection, monkeypatch) -> None:
    def broken(name: str) -> None:
        raise OSError(f"{name}: undefined symbol")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib, "import_module", broken)
    assert kernels.ssd_kernel() is None
    reasons = [reason for *_, reason in kernels.kernel_table()]
    assert all(reason.startswith("OSError: ") and reason.endswith("undefined symbol") for reason in reasons)
