"""The local dispatcher equals a loop over tokens."""

import pytest
import torch
from torch import Tensor

from modules.backbone.dispatch import LocalDispatcher
from tests.modules.helpers import assert_close


@pytest.mark.parametrize(("tokens", "top_k", "num_experts"), [(1, 1, 1), (7, 2, 5), (11, 5, 5), (3, 1, 8)])
def test_equals_a_loop_over_tokens(tokens: int, top_k: int, num_experts: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 6, generator=generator, requires_grad=True)
    matrices = torch.randn(num_experts, 6, 6, generator=generator, requires_grad=True)
    weights = torch.rand(tokens, top_k, generator=generator, requires_grad=True)
    experts = torch.stack([torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(tokens)])

    def compute(rows: Tensor, offsets: Tensor) -> Tensor:
        assert offsets.dtype == torch.int32
        assert offsets.tolist() == [int((experts <= expert).sum()) for expert in range(num_experts)]
        starts = [0, *offsets.tolist()]
        return torch.cat([rows[starts[e] : starts[e + 1]] @ matrices[e] for e in range(num_experts)])

    expected = torch.stack(
        [sum(weights[t, k] * (x[t] @ matrices[experts[t, k]]) for k in range(top_k)) for t in range(tokens)]
    )
    actual = LocalDispatcher()(x, weights, experts, num_experts, compute)
    assert_close(actual, expected, 1e-5)
    probe = torch.randn(tokens, 6, generator=generator)
    ours = torch.autograd.grad((actual * probe).sum(), (x, matrices, weights))
    theirs = torch.autograd.grad((expected * probe).sum(), (x, matrices, weights))
    for gradient, reference in zip(ours, theirs, strict=True):
        assert_close(gradient, reference, 1e-5, "gradient")


def test_weighs_in_fp32_and_returns_the_input_dtype() -> None:
    """Two experts that cancel but for a difference of their weights that bf16 cannot hold."""
    x = torch.ones(1, 4, dtype=torch.bfloat16)
    weights = torch.tensor([[0.5 + 2**-12, 0.5]])
    signs = torch.tensor([[1.0], [-1.0]], dtype=torch.bfloat16)
    out = LocalDispatcher()(x, weights, torch.tensor([[0, 1]]), 2, lambda rows, _: rows * signs)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, torch.full((1, 4), 2**-12).bfloat16())


def test_gradients_repeat_bit_for_bit_on_two_threads() -> None:
    """Rows of one token meet in its gradient: added up atomically, their order would change from run to run."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 128, generator=generator, requires_grad=True)
    weights = torch.rand(4096, 4, generator=generator)
    experts = torch.rand(4096, 16, generator=generator).topk(4).indices
    probe = torch.randn(4096, 128, generator=generator)

    def gradient() -> Tensor:
        out = LocalDispatcher()(x, weights, experts, 16, lambda rows, _: rows * 1.5)
        return torch.autograd.grad((out * probe).sum(), x)[0]

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = gradient()
        assert all(torch.equal(gradient(), first) for _ in range(10))
    finally:
        torch.set_num_threads(threads)
