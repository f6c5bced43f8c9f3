"""Going on from a state equals the whole scan; stochastic rounding has the right mean and neighbours."""

import pytest
import torch

from modules.ops.recurrence import read_scan, round_stochastically, step_scan, take_over
from tests.modules.helpers import assert_close


def loop(x, dt, A, B, C, D, state):
    """The recurrence of arXiv 2405.21060, position by position and head by head."""
    y, state = torch.empty_like(x), state.clone()
    heads_per_group = x.shape[2] // B.shape[2]
    for row in range(len(x)):
        for position in range(x.shape[1]):
            for head in range(x.shape[2]):
                group, step = head // heads_per_group, dt[row, position, head]
                state[row, head] *= torch.exp(step * A[head])
                state[row, head] += step * torch.outer(x[row, position, head], B[row, position, group])
                y[row, position, head] = state[row, head] @ C[row, position, group] + D[head] * x[row, position, head]
    return y, state


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "x": draw(3, 5, 6, 4),
        "dt": draw(3, 5, 6).abs(),
        "A": -draw(6).abs() - 0.1,
        "B": draw(3, 5, 2, 7),
        "C": draw(3, 5, 2, 7),
        "D": draw(6),
        "state": draw(3, 6, 4, 7),
    }


def test_reading_leaves_the_state_and_taking_over_brings_it_on(problem):
    y, state = loop(**problem)
    kept = problem["state"].clone()
    assert_close(read_scan(**problem), y, 1e-5)
    assert torch.equal(problem["state"], kept)
    arguments = {name: problem[name] for name in ("x", "dt", "A", "B")}
    take_over(**arguments, state=kept)
    assert_close(kept, state, 1e-5)


def test_one_position_at_a_time(problem):
    expected, expected_state = loop(**problem)
    state = problem.pop("state")
    per_head = {name: problem.pop(name) for name in ("A", "D")}
    for position in range(5):
        one = {name: value[:, position : position + 1] for name, value in problem.items()}
        assert_close(step_scan(**one, **per_head, state=state), expected[:, position : position + 1], 1e-5)
    assert_close(state, expected_state, 1e-5)


def test_stochastic_rounding_goes_to_the_neighbours_with_the_right_mean():
    generator = torch.Generator().manual_seed(0)
    magnitudes = 2.0 ** torch.linspace(-26, 15, 200)
    values = torch.cat([magnitudes * 1.2345, -magnitudes * 1.2345, torch.zeros(1)])
    draws = torch.stack([round_stochastically(values, torch.float16, generator) for _ in range(4000)])
    low, high = draws.float().amin(0), draws.float().amax(0)
    nearest = values.half()
    unit = torch.maximum(2.0 ** (values.abs().clamp(min=2.0**-14).log2().floor() - 10), torch.tensor(2.0**-24))
    assert ((values >= low) & (values <= high)).all()
    assert (high - low <= unit * 1.001).all()
    assert ((nearest.float() == low) | (nearest.float() == high)).all()
    assert ((draws.double().mean(0) - values).abs() <= 0.04 * unit).all()


def test_stochastic_rounding_keeps_what_fp16_holds_and_saturates():
    exact = torch.tensor([0.0, 1.0, -2.5, 65504.0, 2.0**-24, -(2.0**-14), 1023.5])
    assert torch.equal(round_stochastically(exact, torch.float16, None).float(), exact)
    assert round_stochastically(torch.tensor([1e6, -1e6]), torch.float16, None).tolist() == [65504.0, -65504.0]
