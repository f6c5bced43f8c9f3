"""The expert product equals a loop over experts, with and without the alignment the grouped kernel wants."""

import pytest
import torch
from torch import Tensor

from modules.ops.experts import _grouped_mm, grouped_linear
from tests.modules.helpers import assert_close

ROWS = {
    "even": [4, 4, 4, 4],
    "empty first, middle and last": [0, 5, 0, 7, 3, 0],
    "one expert has all": [0, 9, 0],
    "single expert": [6],
    "uneven": [1, 2, 17, 3],
}


def loop(x: Tensor, weight: Tensor, rows: list[int]) -> Tensor:
    parts, start = [], 0
    for expert, count in enumerate(rows):
        parts.append(x[start : start + count] @ weight[expert].T)
        start += count
    return torch.cat(parts)


def make_inputs(rows: list[int], inside: int, outside: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(inside * outside)
    x = torch.randn(sum(rows), inside, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(len(rows), outside, inside, generator=generator).to(dtype).requires_grad_()
    return x, weight, torch.tensor(rows).cumsum(0).int()


@pytest.mark.parametrize("multiply", [grouped_linear, _grouped_mm], ids=["as on a CPU", "as on CUDA"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize(("inside", "outside"), [(8, 16), (16, 4), (7, 8), (8, 7), (3, 5), (1, 1)])
def test_equals_a_loop(inside: int, outside: int, rows: list[int], multiply) -> None:
    x, weight, offsets = make_inputs(rows, inside, outside)
    probe = torch.randn(sum(rows), outside, generator=torch.Generator().manual_seed(1))
    actual, expected = multiply(x, weight, offsets), loop(x, weight, rows)
    assert_close(actual, expected, 1e-5)
    ours = torch.autograd.grad((actual * probe).sum(), (x, weight))
    theirs = torch.autograd.grad((expected * probe).sum(), (x, weight))
    assert_close(ours[0], theirs[0], 1e-5, "gradient of x")
    for expert in range(len(rows)):
        # Expert by expert: one without rows must get exactly zero, not what lay in memory.
        assert_close(ours[1][expert], theirs[1][expert], 1e-5, f"gradient of expert {expert}")


@pytest.mark.parametrize(("inside", "outside"), [(8, 16), (12, 8), (5, 3)])
def test_bf16_equals_the_loop(inside: int, outside: int) -> None:
    rows = ROWS["empty first, middle and last"]
    x, weight, offsets = make_inputs(rows, inside, outside, torch.bfloat16)
    out = grouped_linear(x, weight, offsets)
    assert out.dtype == torch.bfloat16
    assert_close(out, loop(x.float(), weight.float(), rows), 1e-2)


@pytest.mark.parametrize("width", [8, 7])
def test_no_rows_at_all(width: int) -> None:
    assert grouped_linear(*make_inputs([0, 0, 0], width, width)).shape == (0, width)
