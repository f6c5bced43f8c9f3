"""Every generator comes back, from a state that is plain enough to be loaded safely."""

import io
import random

import numpy
import torch

from callbacks.random_state import random_state, set_random_state


def draw():
    return (
        random.random(),
        random.gauss(0, 1),
        numpy.random.rand(3).tolist(),
        numpy.random.randn(),
        torch.rand(3).tolist(),
    )


def test_generators_go_on_where_they_were():
    draw()
    state = random_state()
    expected = [draw() for _ in range(3)]
    draw()
    set_random_state(state)
    assert [draw() for _ in range(3)] == expected


def test_the_state_is_loadable_without_code():
    buffer = io.BytesIO()
    torch.save(random_state(), buffer)
    expected = draw()
    buffer.seek(0)
    set_random_state(torch.load(buffer, weights_only=True))
    assert draw() == expected
