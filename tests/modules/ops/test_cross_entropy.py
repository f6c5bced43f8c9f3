"""Head and cross-entropy in chunks equal `F.cross_entropy` over all logits, without ever holding them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modules.ops.cross_entropy import linear_cross_entropy
from tests.modules.helpers import assert_close

LARGE_VOCABULARY = 131072
"""Makes chunks of a few tokens, so that few tokens cross several borders."""


def make_inputs(tokens: int, vocab_size: int, size: int = 8, ignored: float = 0.3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, size, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab_size, size, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab_size, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = -100
    return hidden, weight, labels, torch.rand(tokens, generator=generator)


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> tuple[Tensor, Tensor]:
    """In fp64: a sum over a large vocabulary rounds in fp32, in their sum as in ours."""
    nats = F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="none", ignore_index=-100)
    return (nats * token_weights).sum(), nats


def compare(inputs: tuple[Tensor, ...], tolerance: float) -> None:
    hidden, weight = inputs[:2]
    (loss, nats), (expected_loss, expected_nats) = linear_cross_entropy(*inputs), reference(*inputs)
    assert loss.dtype == nats.dtype == torch.float32
    assert loss.shape == ()
    assert not nats.requires_grad
    assert_close(loss, expected_loss, tolerance, "loss")
    assert_close(nats, expected_nats, tolerance, "nats")
    # A factor behind the loss, as the accumulation window puts one there.
    ours = torch.autograd.grad(3 * loss, (hidden, weight))
    theirs = torch.autograd.grad(3 * expected_loss, (hidden, weight))
    for name, gradient, expected in zip(("hidden", "weight"), ours, theirs, strict=True):
        assert gradient.dtype == hidden.dtype
        assert_close(gradient, expected, tolerance, f"gradient of {name}")


@pytest.mark.parametrize("tokens", [1, 5, 64])
@pytest.mark.parametrize("vocab_size", [2, 50, 1000])
def test_equals_cross_entropy(tokens: int, vocab_size: int) -> None:
    compare(make_inputs(tokens, vocab_size), 1e-5)


@pytest.mark.parametrize("tokens", [16, 31, 32, 33, 70])
def test_equals_cross_entropy_over_chunk_borders(tokens: int) -> None:
    # fp32 sums over the vocabulary, in torch's own log_softmax as in the products, allow no more here.
    compare(make_inputs(tokens, LARGE_VOCABULARY), 5e-4)


def test_equals_cross_entropy_in_bf16() -> None:
    compare(make_inputs(40, 500, dtype=torch.bfloat16), 2e-2)


def test_large_logits_stay_finite() -> None:
    hidden, weight, labels, token_weights = make_inputs(20, 50)
    with torch.no_grad():
        hidden *= 1e4
    compare((hidden, weight, labels, token_weights), 1e-5)


def test_ignored_tokens_give_nothing_whatever_their_weight() -> None:
    hidden, weight, labels, token_weights = make_inputs(12, 50, ignored=0.0)
    labels[4:] = -100
    token_weights[4:] = 1e30
    loss, nats = linear_cross_entropy(hidden, weight, labels, token_weights)
    short, _ = reference(hidden[:4], weight, labels[:4], token_weights[:4])
    assert_close(loss, short, 1e-5)
    assert torch.equal(nats[4:], torch.zeros(8))
    loss.backward()
    assert torch.equal(hidden.grad[4:], torch.zeros(8, 8))


def test_all_ignored_is_zero() -> None:
    hidden, weight, labels, token_weights = make_inputs(6, 50, ignored=1.1)
    loss, _ = linear_cross_entropy(hidden, weight, labels, token_weights)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_frozen_inputs(frozen: str) -> None:
    hidden, weight, labels, token_weights = make_inputs(12, 50)
    inputs = [hidden.detach() if frozen in ("hidden", "both") else hidden]
    inputs += [weight.detach() if frozen in ("weight", "both") else weight]
    loss, _ = linear_cross_entropy(*inputs, labels, token_weights)
    expected, _ = reference(*inputs, labels, token_weights)
    assert_close(loss, expected, 1e-5)
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    for leaf in leaves:
        assert_close(
            torch.autograd.grad(loss, leaf, retain_graph=True)[0],
            torch.autograd.grad(expected, leaf, retain_graph=True)[0],
            1e-5,
        )


class LargestResult(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_holds_all_logits(dtype: torch.dtype) -> None:
    tokens = 512
    inputs = make_inputs(tokens, LARGE_VOCABULARY, dtype=dtype)
    with LargestResult() as largest:
        loss, _ = linear_cross_entropy(*inputs)
        loss.backward()
    assert LARGE_VOCABULARY <= largest.elements <= tokens * LARGE_VOCABULARY // 8
    with LargestResult() as largest:
        reference(*make_inputs(8, LARGE_VOCABULARY))
    assert largest.elements == 8 * LARGE_VOCABULARY, "the recorder sees logits where there are some"
