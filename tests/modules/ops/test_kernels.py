"""Fast kernels: what is detected, how they are called, and that on CUDA every operation equals the portable one.

How mamba-ssm's scan is called is tested with the kernel itself, see `test_interpreted_ssd.py`.
"""

import functools
import importlib
import inspect
import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from modules.objectives import per_token
from modules.ops import attention as attention_module
from modules.ops import kernels
from modules.ops.attention import attention
from modules.ops.chunked_head import LogitTransform, chunked_loss, token_log_probabilities
from modules.ops.convolution import causal_convolution
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

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return chunked_loss(hidden, weight, per_token.cross_entropy, token_weights=weights, labels=labels)[0]

    return loss, [normal(40, 64, dtype=dtype), normal(100, 64, dtype=dtype)]


def run_distillation(device: str, dtype: torch.dtype) -> tuple[Callable, list[Tensor]]:
    positions, teacher = torch.arange(0, 40, 3, device=device), normal(100, 48, dtype=dtype).to(device)
    objective = per_token.against(per_token.jensen_shannon, lambda rows: (rows @ teacher.T).float())
    inputs = {"token_weights": torch.linspace(0, 1, 40, device=device), "positions": positions}
    inputs["teacher_hidden"] = normal(40, 48, dtype=dtype).to(device)
    transform = LogitTransform(scale=0.7, soft_cap=5.0, temperature=0.9)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return chunked_loss(hidden, weight, objective, transform=transform, **inputs)[0]

    return loss, [normal(40, 64, dtype=dtype), normal(100, 64, dtype=dtype)]


def run_log_probabilities(device: str, dtype: torch.dtype) -> tuple[Callable, list[Tensor]]:
    labels, positions = torch.arange(40, device=device), torch.arange(0, 40, 3, device=device)

    def total(hidden: Tensor, weight: Tensor) -> Tensor:
        return torch.stack(token_log_probabilities(hidden, weight, labels, positions=positions))

    return total, [normal(40, 64, dtype=dtype), normal(100, 64, dtype=dtype)]


OPERATIONS = [
    run_attention,
    run_ssd,
    run_convolution,
    run_experts,
    run_cross_entropy,
    run_distillation,
    run_log_probabilities,
]


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


class CudaLike:
    """What detection asks of a tensor."""

    device = torch.device("cuda")

    def __init__(self, dtype: torch.dtype = torch.bfloat16, *shape: int) -> None:
        self.dtype, self.shape = dtype, shape or (2, 8, 4, 64)


@pytest.fixture
def fresh_detection():
    kernels._import.cache_clear()
    yield
    kernels._import.cache_clear()


def test_without_cuda_nothing_is_active_and_the_table_says_why(fresh_detection, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.ssd_kernel(CudaLike()) is None
    assert kernels.varlen_attention_kernel(CudaLike()) is None
    assert {reason for *_, reason in kernels.kernel_table()} == {"no CUDA device"}


def test_a_kernel_that_does_not_import_is_a_reason_and_no_error(fresh_detection, monkeypatch) -> None:
    def broken(name: str) -> None:
        raise OSError(f"{name}: undefined symbol")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib, "import_module", broken)
    assert kernels.ssd_kernel(CudaLike()) is None
    reasons = [reason for *_, reason in kernels.kernel_table()]
    assert all(reason.startswith("OSError: ") and reason.endswith("undefined symbol") for reason in reasons)


def test_kernels_run_on_16_bits_on_cuda_only(fresh_detection, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = SimpleNamespace(mamba_chunk_scan_combined=lambda: "scan", varlen_attn=lambda: "attention")
    monkeypatch.setattr(importlib, "import_module", lambda name: found)
    for dtype in (torch.bfloat16, torch.float16):
        assert kernels.ssd_kernel(CudaLike(dtype))() == "scan"
        assert kernels.varlen_attention_kernel(CudaLike(dtype))() == "attention"
    for unfit in (CudaLike(torch.float32), torch.zeros(2, 8, 4, 64, dtype=torch.bfloat16)):
        assert kernels.ssd_kernel(unfit) is kernels.varlen_attention_kernel(unfit) is None
    for head_dim in (5, 12, 264):
        assert kernels.varlen_attention_kernel(CudaLike(torch.bfloat16, 2, 8, 4, head_dim)) is None


def old_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size) -> Tensor:
    """torch 2.11's `varlen_attn` as it is documented: [N, heads, P] each, equally many heads."""
    assert query.shape == key.shape == value.shape
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k >= cu_seq_q.diff().max()
    assert window_size == (-1, 0), "causal"
    parts = itertools.pairwise(cu_seq_q.tolist())
    return torch.cat([masked_softmax(*(tensor[start:end] for tensor in (query, key, value))) for start, end in parts])


def new_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa=False) -> Tensor:
    """torch 2.13's: key heads may be fewer, if told so."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    return old_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size)


def masked_softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = torch.einsum("qhp,khp->hqk", query, key) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf"))
    return torch.einsum("hqk,khp->qhp", scores.softmax(-1), value)


@pytest.mark.parametrize("heads", [(4, 2, 2), (4, 1, 1), (3, 3, 3)], ids=str)
@pytest.mark.parametrize("kernel", [old_varlen, new_varlen])
def test_attention_calls_the_kernel_as_it_is_documented(kernel, heads, monkeypatch) -> None:
    layout = DocumentLayout(IDS)
    inputs = [normal(2, 128, count, 8).requires_grad_() for count in heads]
    probe = normal(2, 128, heads[0], 8)
    expected = attention(*inputs, layout)
    monkeypatch.setattr(attention_module, "varlen_attention_kernel", lambda query: kernel)
    actual = attention(*inputs, layout)
    assert_close(actual, expected, 1e-5)
    pairs = (torch.autograd.grad((out * probe).sum(), inputs) for out in (actual, expected))
    for gradient, expected_gradient in zip(*pairs, strict=True):
        assert_close(gradient, expected_gradient, 1e-4)


def test_attention_calls_the_installed_kernel_with_arguments_that_it_has(monkeypatch) -> None:
    from torch.nn.attention.varlen import varlen_attn

    calls = []

    @functools.wraps(varlen_attn)
    def recorder(*args, **kwargs) -> Tensor:
        calls.append(inspect.signature(varlen_attn).bind(*args, **kwargs).arguments)
        return args[0]

    monkeypatch.setattr(attention_module, "varlen_attention_kernel", lambda query: recorder)
    attention(*(normal(2, 128, count, 8) for count in (4, 2, 2)), DocumentLayout(IDS))
    (call,) = calls
    assert kernels.takes_argument(torch.compiler.disable(varlen_attn), "window_size"), "seen through the wrapper"
    assert call["max_q"] == call["max_k"] == 128
    assert call["cu_seq_q"].tolist() == [0, 5, 75, 128, 256]
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        assert call["enable_gqa"] is True
        assert call["key"].shape == (256, 2, 8), "nothing is repeated"
