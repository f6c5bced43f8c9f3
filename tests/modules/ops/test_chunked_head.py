"""The chunked head equals the dense form, values and gradients, for every objective, and never holds all logits."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modules.objectives import per_token
from modules.ops.chunked_head import CHUNK_LOGITS, IDENTITY, LogitTransform, chunked_loss, token_log_probabilities
from tests.modules.helpers import assert_close, relative_error

LARGE_VOCABULARY = 131072
"""Makes chunks of a few tokens, so that few tokens cross several borders."""
VOCABULARY, TEACHER_SIZE, K = 50, 12, 7


# ------------------------------------------------------------------------------------------------------ cross-entropy


def make_inputs(tokens: int, vocab_size: int, size: int = 8, ignored: float = 0.3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, size, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab_size, size, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab_size, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = -100
    return hidden, weight, labels, torch.rand(tokens, generator=generator)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor):
    objective = per_token.cross_entropy
    loss, results = chunked_loss(hidden, weight, objective, token_weights=token_weights, labels=labels)
    assert results.keys() == {"loss"}
    return loss, results["loss"]


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


# ---------------------------------------------------------------------------------- every objective, dense by autograd


def dense_logits(hidden: Tensor, weight: Tensor, transform: LogitTransform) -> Tensor:
    z = F.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32))
    z = z * transform.scale if transform.bias is None else (z + transform.bias) * transform.scale
    if transform.soft_cap is not None:
        z = transform.soft_cap * torch.tanh(z / transform.soft_cap)
    return z / transform.temperature


def dense_cross_entropy(z: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(z, inputs["labels"], reduction="none")


def divergence(p: Tensor, q: Tensor) -> Tensor:
    return F.kl_div(q.log(), p, reduction="none").sum(-1)


def dense_forward_kl(z: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return divergence(inputs["teacher"].softmax(-1), z.softmax(-1))


def dense_reverse_kl(z: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return divergence(z.softmax(-1), inputs["teacher"].softmax(-1))


def dense_jensen_shannon(z: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    p, q = inputs["teacher"].softmax(-1), z.softmax(-1)
    return (divergence(p, (p + q) / 2) + divergence(q, (p + q) / 2)) / 2


def dense_mean_squared_error(z: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(z, inputs["teacher"].expand_as(z), reduction="none").mean(-1)


def dense_top_k_kl(z: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Of K + 1 outcomes, the last of them everything else."""

    def outcomes(probabilities: Tensor) -> Tensor:
        chosen = probabilities.gather(1, inputs["teacher_ids"])
        return torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], -1)

    return divergence(outcomes(inputs["teacher"].softmax(-1)), outcomes(z.softmax(-1)))


DENSE = {
    "cross_entropy": dense_cross_entropy,
    "forward_kl": dense_forward_kl,
    "reverse_kl": dense_reverse_kl,
    "jensen_shannon": dense_jensen_shannon,
    "mean_squared_error": dense_mean_squared_error,
    "top_k_kl": dense_top_k_kl,
}
TRANSFORMS = {
    "plain": IDENTITY,
    "scale": LogitTransform(scale=0.3),
    "bias": LogitTransform(bias=torch.linspace(-2, 2, VOCABULARY).requires_grad_()),
    "soft cap": LogitTransform(soft_cap=2.5),
    "temperature": LogitTransform(temperature=0.7),
    "all": LogitTransform(1.7, torch.linspace(-2, 2, VOCABULARY).requires_grad_(), 3.0, 0.8),
}
TEACHER_TRANSFORM = LogitTransform(scale=0.8, soft_cap=4.0)


class Case:
    """An objective with its inputs for N tokens, chunked and dense."""

    def __init__(self, name: str, tokens: int, dtype: torch.dtype = torch.float32, size: int = 8) -> None:
        self.name, generator = name, torch.Generator().manual_seed(tokens)
        normal = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
        self.hidden, self.weight = normal(tokens, size), normal(VOCABULARY, size)
        self.token_weights = torch.rand(tokens, generator=generator) + 0.1
        self.teacher_hidden, teacher_weight = normal(tokens, TEACHER_SIZE), normal(VOCABULARY, TEACHER_SIZE)
        self.teacher_head = lambda rows: F.linear(rows, teacher_weight).float()
        self.teacher = dense_logits(self.teacher_hidden, teacher_weight, TEACHER_TRANSFORM)
        self.labels = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
        self.teacher_ids = self.teacher.topk(K).indices

    def leaves(self, transform: LogitTransform, dtype: torch.dtype | None = None) -> list[Tensor]:
        leaves = [self.hidden, self.weight, *([] if transform.bias is None else [transform.bias])]
        return [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]

    def chunked(
        self, leaves: list[Tensor], transform: LogitTransform, positions: Tensor | None = None, **inputs: Tensor
    ):
        hidden, weight, *bias = leaves
        objective, per_token_inputs = getattr(per_token, self.name), {"teacher_hidden": self.teacher_hidden}
        if self.name == "cross_entropy":
            per_token_inputs = {"labels": self.labels}
        elif self.name == "top_k_kl":
            known = self.teacher.log_softmax(-1).gather(1, self.teacher_ids)
            per_token_inputs = {"teacher_log_probabilities": known, "teacher_ids": self.teacher_ids}
        else:
            objective = per_token.against(objective, self.teacher_head, TEACHER_TRANSFORM)
        transform = with_bias(transform, bias)
        weights = {"token_weights": self.token_weights, "positions": positions, "transform": transform}
        return chunked_loss(hidden, weight, objective, **weights, **per_token_inputs, **inputs)

    def dense(self, leaves: list[Tensor], transform: LogitTransform, positions: Tensor | None = None):
        hidden, weight, *bias = leaves
        logits = dense_logits(hidden, weight, with_bias(transform, bias))
        teacher = self.teacher.to(logits.dtype)
        losses = DENSE[self.name](logits, {"labels": self.labels, "teacher": teacher, "teacher_ids": self.teacher_ids})
        counted = torch.ones(len(hidden)) if positions is None else torch.zeros(len(hidden)).index_fill(0, positions, 1)
        losses = losses * counted
        return (losses * self.token_weights).sum(), losses


def with_bias(transform: LogitTransform, bias: list[Tensor]) -> LogitTransform:
    return LogitTransform(transform.scale, *(bias or [None]), transform.soft_cap, transform.temperature)


@pytest.fixture
def chunks_of_seven(monkeypatch) -> None:
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", 7 * VOCABULARY + 3)


def assert_equal_to_dense(case: "Case", change: LogitTransform, positions: Tensor | None) -> dict[str, Tensor]:
    """Hold loss, results and gradients to 1e-6 of dense fp64, or to twice what dense fp32 is off where that is more."""
    found = []
    for function, dtype in ((case.chunked, None), (case.dense, torch.float64), (case.dense, None)):
        leaves = case.leaves(change, dtype)
        loss, results = function(leaves, change, positions)
        found.append([loss, results, *torch.autograd.grad(3 * loss, leaves)])
    results = found[0][1]
    assert not results["loss"].requires_grad
    found[0][1] = results["loss"]
    for what, ours, exact, dense in zip(("loss", "losses", "hidden", "weight", "bias"), *found, strict=False):
        assert_close(ours, exact, max(1e-6, 2 * relative_error(dense, exact)), what)
    return results


@pytest.mark.usefixtures("chunks_of_seven")
@pytest.mark.parametrize("tokens", [1, 7, 31])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", DENSE)
def test_every_objective_equals_autograd_through_dense_logits(name: str, transform: str, tokens: int) -> None:
    assert_equal_to_dense(Case(name, tokens), TRANSFORMS[transform], None)


@pytest.mark.usefixtures("chunks_of_seven")
@pytest.mark.parametrize("count", [0, 1, 11])
@pytest.mark.parametrize("name", DENSE)
def test_only_the_tokens_at_positions_count(name: str, count: int) -> None:
    positions = torch.randperm(31, generator=torch.Generator().manual_seed(count))[:count]
    results = assert_equal_to_dense(Case(name, 31), TRANSFORMS["all"], positions)
    assert results["loss"].count_nonzero() == count


def bf16_errors(values: list[tuple[Tensor, list[Tensor]]]) -> list[list[float]]:
    """Errors of the gradients of the second and third loss, over the norms of those of the first."""
    exact, *others = [torch.autograd.grad(loss, leaves) for loss, leaves in values]
    assert all(gradient.dtype == torch.bfloat16 for gradient in others[0])
    return [
        [((a.double() - b).norm() / b.norm()).item() for a, b in zip(other, exact, strict=True)] for other in others
    ]


@pytest.mark.parametrize("name", DENSE)
def test_bf16_is_no_further_from_fp32_than_dense_bf16(name: str) -> None:
    case = Case(name, 300, torch.bfloat16, 64)
    exact, ours, dense = case.leaves(IDENTITY, torch.float64), case.leaves(IDENTITY), case.leaves(IDENTITY)
    losses = [case.dense(exact, IDENTITY), case.chunked(ours, IDENTITY), case.dense(dense, IDENTITY)]
    errors = bf16_errors([(value[0], leaves) for value, leaves in zip(losses, (exact, ours, dense), strict=True)])
    # Cross-entropy rounds once more, the token weights times the D-wide sides, and saves a pass over V for it.
    allowed = 1.06 if name == "cross_entropy" else 1.001
    assert all(error <= allowed * limit for error, limit in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("name", DENSE)
def test_without_gradients_the_values_are_the_same(name: str) -> None:
    case = Case(name, 31)
    leaves = case.leaves(IDENTITY)
    loss, results = case.chunked(leaves, IDENTITY)
    with torch.no_grad():
        quiet, others = case.chunked(leaves, IDENTITY)
    assert loss.requires_grad
    assert not quiet.requires_grad
    assert torch.equal(loss, quiet)
    assert torch.equal(results["loss"], others["loss"])
    frozen, _ = case.chunked([leaf.detach() for leaf in leaves], IDENTITY)
    assert not frozen.requires_grad


@pytest.mark.parametrize("name", ["token_weights", "teacher_hidden"])
def test_an_input_that_would_silently_get_no_gradient_is_refused(name: str) -> None:
    hidden, weight, _, token_weights = make_inputs(5, 11)
    inputs = {"token_weights": token_weights, "teacher_hidden": hidden.detach().clone()}
    objective = per_token.against(per_token.forward_kl, lambda x: x @ weight.detach().T)
    chunked_loss(hidden, weight, objective, **inputs)
    inputs[name].requires_grad_()
    with pytest.raises(AssertionError, match="no gradient"):
        chunked_loss(hidden, weight, objective, **inputs)


def test_an_objective_returns_what_it_wants_by_name() -> None:
    """Its own results of any width, spread to all tokens; a second input of each token."""

    def objective(logits: Tensor, labels: Tensor, advantages: Tensor):
        found, gradient = per_token.cross_entropy(logits.clone(), labels)
        best = logits.topk(2)
        results = {"loss": found["loss"] * advantages, "best": best.indices, "values": best.values}
        results["large"] = best.values[:, 0] > 5
        return results, gradient * advantages.unsqueeze(-1)

    hidden, weight, labels, advantages = make_inputs(20, VOCABULARY)
    positions, ones = torch.tensor([3, 17, 8]), torch.ones(20)
    inputs = {"labels": labels, "advantages": advantages, "token_weights": ones, "positions": positions}
    loss, results = chunked_loss(hidden, weight, objective, **inputs)
    counted = torch.zeros(20).index_fill(0, positions, 1) * (labels != -100)
    expected, _ = reference(hidden, weight, labels, advantages * counted)
    assert_close(loss, expected, 1e-6)
    assert_close(*torch.autograd.grad(loss, weight), torch.autograd.grad(expected, weight)[0], 1e-6)
    top = (hidden @ weight.T).topk(2)
    assert results["best"].shape == results["values"].shape == (20, 2)
    assert torch.equal(results["best"], top.indices * counted.long()[:, None])
    assert_close(results["values"], top.values * counted[:, None], 1e-6)
    assert torch.equal(results["large"], (top.values[:, 0] > 5) & counted.bool())


@pytest.mark.parametrize("name", ["forward_kl", "top_k_kl"])
def test_labels_say_what_counts_whatever_the_objective(name: str) -> None:
    case = Case(name, 31)
    positions = torch.arange(0, 31, 4)
    labels = torch.full((31,), -100).index_fill(0, positions, 5)
    leaves, others = case.leaves(IDENTITY), case.leaves(IDENTITY)
    loss, results = case.chunked(leaves, IDENTITY, labels=labels)
    expected, losses = case.dense(others, IDENTITY, positions)
    assert_close(loss, expected, 2e-6)
    assert_close(results["loss"], losses, 2e-6)
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, others), strict=True):
        assert_close(ours, theirs, 2e-6)


# ------------------------------------------------------------------------------------------- log-probabilities, entropy


def clipped_ratio(log_probabilities: Tensor, entropies: Tensor, sampled: Tensor, advantages: Tensor) -> Tensor:
    """A sequence-level clipped ratio with an entropy bonus: nothing whose weights are known before."""
    ratios = (log_probabilities - sampled).exp()
    clipped = torch.minimum(ratios * advantages, ratios.clamp(0.8, 1.2) * advantages).sum()
    return clipped + (log_probabilities.sum() / 40).exp() + 0.3 * entropies.square().sum()


@pytest.mark.usefixtures("chunks_of_seven")
@pytest.mark.parametrize("count", [None, 0, 1, 11])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_log_probabilities_and_entropies_are_differentiable(transform: str, count: int | None) -> None:
    case, change = Case("cross_entropy", 31), TRANSFORMS[transform]
    case.labels[::5] = -100
    positions = None if count is None else torch.randperm(31, generator=torch.Generator().manual_seed(count))[:count]
    counted = torch.ones(31) if positions is None else torch.zeros(31).index_fill(0, positions, 1)
    counted = counted * (case.labels != -100)
    generator = torch.Generator().manual_seed(1)
    advantages = torch.randn(31, generator=generator)
    found = []
    for dtype in (torch.float32, torch.float64):
        hidden, weight, *bias = leaves = case.leaves(change, dtype)
        full = with_bias(change, bias)
        if dtype == torch.float32:
            values = token_log_probabilities(hidden, weight, case.labels, positions=positions, transform=full)
        else:
            logs = dense_logits(hidden, weight, full).log_softmax(-1)
            chosen = logs.gather(1, case.labels.clamp(min=0)[:, None]).squeeze(1)
            values = chosen * counted, -(logs.exp() * logs).sum(-1) * counted
        sampled = values[0].detach() + torch.linspace(-0.4, 0.4, 31)
        loss = clipped_ratio(*values, sampled, advantages)
        found.append([*values, *torch.autograd.grad(loss, leaves)])
    for index, (ours, expected) in enumerate(zip(*found, strict=True)):
        assert_close(ours, expected, 2e-6, f"result {index}", floor=1e-3)


@pytest.mark.parametrize("kept", [0, 1])
def test_one_of_the_two_outputs_may_go_unused(kept: int) -> None:
    hidden, weight, labels, _ = make_inputs(12, VOCABULARY, ignored=0.0)
    values = token_log_probabilities(hidden, weight, labels)
    logs = (hidden @ weight.T).log_softmax(-1)
    expected = [logs.gather(1, labels[:, None]).sum(), -(logs.exp() * logs).sum()][kept]
    for leaf in (hidden, weight):
        ours, theirs = (torch.autograd.grad(v, leaf, retain_graph=True)[0] for v in (values[kept].sum(), expected))
        assert_close(ours, theirs, 1e-6)


def test_bf16_log_probabilities_are_no_further_from_fp32_than_dense_ones() -> None:
    hidden, weight, labels, weights = make_inputs(300, VOCABULARY, 64, 0.0, torch.bfloat16)

    def dense(hidden: Tensor, weight: Tensor) -> Tensor:
        logs = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)).log_softmax(-1)
        return logs.gather(1, labels[:, None]).squeeze(1)

    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    found = token_log_probabilities(hidden, weight, labels).log_probabilities
    pairs = [(dense(*exact), exact), (found, [hidden, weight]), (dense(hidden, weight), [hidden, weight])]
    ours, limits = bf16_errors([((values * weights).sum(), leaves) for values, leaves in pairs])
    assert all(error <= 1.001 * limit for error, limit in zip(ours, limits, strict=True)), (ours, limits)


def test_without_gradients_log_probabilities_are_the_same() -> None:
    hidden, weight, labels, _ = make_inputs(31, VOCABULARY)
    found = token_log_probabilities(hidden, weight, labels)
    with torch.no_grad():
        quiet = token_log_probabilities(hidden, weight, labels)
    for value, other in zip(found, quiet, strict=True):
        assert value.requires_grad
        assert not other.requires_grad
        assert torch.equal(value, other)


# ----------------------------------------------------------------------------------------------------- waits and memory


@pytest.mark.parametrize("name", [*DENSE, "log-probabilities"])
def test_the_host_asks_the_device_for_nothing(name: str, monkeypatch) -> None:
    """Meta tensors hold no values: whatever wants to know one raises."""
    monkeypatch.setitem(CHUNK_LOGITS, "meta", 7 * VOCABULARY)
    tensors = {key: torch.empty(31, size, device="meta") for key, size in (("hidden", 8), ("teacher_hidden", 12))}
    weight, teacher_weight = (torch.empty(VOCABULARY, size, device="meta", requires_grad=True) for size in (8, 12))
    labels, positions = (torch.empty(size, dtype=torch.int64, device="meta") for size in (31, 11))
    hidden, token_weights = tensors["hidden"].requires_grad_(), torch.empty(31, device="meta")
    shared = {"positions": positions, "transform": LogitTransform(scale=2.0, soft_cap=5.0)}
    if name == "log-probabilities":
        loss = sum(value.sum() for value in token_log_probabilities(hidden, weight, labels, **shared))
    else:
        objective, inputs = getattr(per_token, name), {"labels": labels, "token_weights": token_weights, **shared}
        if name == "top_k_kl":
            ids = torch.empty(31, K, dtype=torch.int64, device="meta")
            inputs |= {"teacher_ids": ids, "teacher_log_probabilities": torch.empty(31, K, device="meta")}
        elif name != "cross_entropy":
            objective = per_token.against(objective, lambda rows: rows @ teacher_weight.T)
            inputs["teacher_hidden"] = tensors["teacher_hidden"]
        loss, _ = chunked_loss(hidden, weight, objective, **inputs)
    loss.backward()
    assert hidden.grad.shape == hidden.shape
    assert weight.grad.shape == weight.shape
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()


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


def run_log_probabilities(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    found = token_log_probabilities(hidden, weight, labels)
    return ((found.log_probabilities + found.entropies) * token_weights).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [lambda *inputs: linear_cross_entropy(*inputs)[0], run_log_probabilities])
def test_never_holds_all_logits(dtype: torch.dtype, function: Callable) -> None:
    tokens = 512
    inputs = make_inputs(tokens, LARGE_VOCABULARY, dtype=dtype)
    with LargestResult() as largest:
        function(*inputs).backward()
    assert LARGE_VOCABULARY <= largest.elements <= tokens * LARGE_VOCABULARY // 8
    with LargestResult() as largest:
        reference(*make_inputs(8, LARGE_VOCABULARY))
    assert largest.elements == 8 * LARGE_VOCABULARY, "the recorder sees logits where there are some"


@pytest.mark.usefixtures("chunks_of_seven")
@pytest.mark.parametrize("name", DENSE)
def test_no_objective_holds_all_logits_of_student_or_teacher(name: str) -> None:
    case = Case(name, 900)
    leaves = case.leaves(TRANSFORMS["all"])
    teacher, case.teacher = case.teacher, case.teacher if name == "top_k_kl" else None
    if name == "top_k_kl":
        known = teacher.log_softmax(-1).gather(1, case.teacher_ids)
        inputs = {"teacher_log_probabilities": known, "teacher_ids": case.teacher_ids}
        call = lambda: chunked_loss(*leaves[:2], per_token.top_k_kl, token_weights=case.token_weights, **inputs)  # noqa: E731
    else:
        call = lambda: case.chunked(leaves, TRANSFORMS["all"])  # noqa: E731
    with LargestResult() as largest:
        call()[0].backward()
    assert 7 * VOCABULARY <= largest.elements <= 900 * TEACHER_SIZE < 900 * VOCABULARY // 4
