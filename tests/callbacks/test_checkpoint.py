"""Which checkpoints are kept; every generator comes back, from a state that is plain enough to be loaded safely."""

import io
import random
from types import SimpleNamespace

import numpy
import torch

from callbacks.checkpoint import Checkpoint, random_state, set_random_state


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


def test_the_newest_up_to_this_step_are_kept(tmp_path):
    """A later checkpoint is one that was damaged: counting it would delete good ones in its place."""
    for step in (50, 100, 150, 200):
        (tmp_path / f"step={step:08d}").mkdir()
    (tmp_path / "step=00000300.partial").mkdir()
    strategy = SimpleNamespace(remove_checkpoint=lambda path: path.rmdir())
    trainer = SimpleNamespace(global_step=150, is_global_zero=True, strategy=strategy)
    Checkpoint(keep_last=2)._remove_old(trainer, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step=00000100",
        "step=00000150",
        "step=00000300.partial",
    ]
