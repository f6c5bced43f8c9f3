"""The chunked scan equals the recurrence, position by position, whatever the chunks, groups and documents."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modules.ops.documents import DocumentLayout
from modules.ops.ssd import ssd
from tests.modules.helpers import assert_close, document_ids, relative_error

NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias")


def make_inputs(length: int, heads: int = 4, groups: int = 2, channels: int = 3, state: int = 5, rows: int = 2):
    generator = torch.Generator().manual_seed(length + 17 * groups)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "x": normal(rows, length, heads, channels),
        "dt": normal(rows, length, heads),
        "A": -normal(heads).exp(),
        "B": normal(rows, length, groups, state),
        "C": normal(rows, length, groups, state),
        "D": normal(heads),
        "dt_bias": normal(heads),
    }


def recurrence(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, ids: Tensor | None = None
) -> Tensor:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T; y_t = h_t C_t + D x_t, in fp64, one position at a time."""
    x, dt, A, B, C, D, dt_bias = (tensor.double() for tensor in (x, dt, A, B, C, D, dt_bias))
    rows, length, heads, channels = x.shape
    per_group = heads // B.shape[2]
    dt = F.softplus(dt + dt_bias)
    outputs = []
    for row in range(rows):
        for head in range(heads):
            group = head // per_group
            state = x.new_zeros(channels, B.shape[-1])
            for t in range(length):
                if ids is not None and t > 0 and ids[row, t] != ids[row, t - 1]:
                    state = torch.zeros_like(state)
                step = dt[row, t, head]
                state = torch.exp(step * A[head]) * state + step * torch.outer(x[row, t, head], B[row, t, group])
                outputs.append(state @ C[row, t, group] + D[head] * x[row, t, head])
    return torch.stack(outputs).view(rows, heads, length, channels).transpose(1, 2)


def run(inputs: dict[str, Tensor], ids: Tensor | None, chunk_size: int) -> Tensor:
    return ssd(**inputs, documents=None if ids is None else DocumentLayout(ids), chunk_size=chunk_size)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("length", "chunk_size"), [(1, 4), (3, 4), (4, 4), (16, 4), (19, 4), (19, 1), (19, 64), (23, 7)]
)
def test_equals_the_recurrence(length: int, chunk_size: int, groups: int) -> None:
    inputs = make_inputs(length, groups=groups)
    assert_close(run(inputs, None, chunk_size), recurrence(**inputs), 1e-5)


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 64])
@pytest.mark.parametrize(
    "rows",
    [
        ([19], [19]),
        ([1, 18], [18, 1]),
        ([4, 8, 7], [3, 1, 1, 14]),
        ([1] * 19, [12, 7]),
        ([5, 5, 5, 4], [16, 3]),
    ],
)
def test_state_starts_anew_at_documents(rows: tuple[list[int], list[int]], chunk_size: int) -> None:
    ids, inputs = document_ids(*rows), make_inputs(19)
    assert_close(run(inputs, ids, chunk_size), recurrence(**inputs, ids=ids), 1e-5)


@pytest.mark.parametrize("chunk_size", [4, 64])
@pytest.mark.parametrize("documents", [False, True])
def test_gradients_equal_the_recurrence(chunk_size: int, documents: bool) -> None:
    ids = document_ids([3, 9, 1], [8, 5]) if documents else None
    inputs = make_inputs(13)
    probe = torch.randn(2, 13, 4, 3, generator=torch.Generator().manual_seed(5))
    ours = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    reference = {name: tensor.double().requires_grad_() for name, tensor in inputs.items()}
    (run(ours, ids, chunk_size) * probe).sum().backward()
    (recurrence(**reference, ids=ids) * probe).sum().backward()
    for name in NAMES:
        assert_close(ours[name].grad, reference[name].grad, 1e-4, f"gradient of {name}")


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("extreme", [-60.0, 60.0, 1000.0, "mixed"])
def test_extreme_step_sizes_stay_finite(extreme: float | str, documents: bool) -> None:
    """dt from 1e-26 (the state is kept) to 1000 (it is forgotten at once): a mask after exp would give inf x 0."""
    inputs = make_inputs(24)
    values = torch.tensor([-60.0, 0.0, 60.0, 1000.0])
    choice = torch.randint(0, 4, inputs["dt"].shape, generator=torch.Generator().manual_seed(0))
    inputs["dt"] = values[choice] if extreme == "mixed" else torch.full_like(inputs["dt"], float(extreme))
    ids = document_ids([5, 11, 8], [24]) if documents else None
    ours = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    out = run(ours, ids, 8)
    assert_close(out, recurrence(**inputs, ids=ids), 1e-4)
    out.sum().backward()
    for name in NAMES:
        assert ours[name].grad.isfinite().all(), f"gradient of {name}"


def test_decays_keep_their_digits_after_large_steps() -> None:
    """After steps that forget all, the running sum of dt A is large; its differences must be those of small steps."""
    inputs = make_inputs(128)
    inputs["dt"][:, :64] = 20.0
    inputs["dt"][:, 64:] -= 3.0
    inputs["A"] = torch.full_like(inputs["A"], -4.0)
    inputs["D"].zero_()
    expected, out = recurrence(**inputs)[:, 64:], run(inputs, None, 128)[:, 64:]
    error = relative_error(out, expected)
    assert error < 2e-6, f"relative error {error:.1e}"


def test_bf16_stays_near_the_exact_scan() -> None:
    inputs = make_inputs(50, channels=8, state=16)
    low = {name: tensor.bfloat16() if name in ("x", "dt", "B", "C") else tensor for name, tensor in inputs.items()}
    out = run(low, document_ids([50], [20, 30]), 16)
    assert out.dtype == torch.bfloat16
    expected = recurrence(**{name: tensor.float() for name, tensor in low.items()}, ids=document_ids([50], [20, 30]))
    error = relative_error(out, expected)
    assert 1e-4 < error < 2e-2, f"relative error {error:.1e}: bf16 operands with fp32 sums are expected"


def test_bf16_keeps_its_state_in_fp32() -> None:
    """A slow state summing ones reaches 2048; in bf16 it would stop growing where adding 4 no longer changes it."""
    length, chunk_size = 2048, 4
    one = torch.ones(1, length, 1, 1, dtype=torch.bfloat16)
    step = torch.full((1, length, 1), 0.5413248, dtype=torch.float32)  # softplus of it is 1
    tiny = torch.full((1,), -1e-9)
    out = ssd(one, step, tiny, one, one, torch.zeros(1), torch.zeros(1), chunk_size=chunk_size)
    assert_close(out.flatten(), torch.arange(1.0, length + 1), 1e-2)
