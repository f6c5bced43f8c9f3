"""Curves in the run folder: optimiser steps on the x axis, no overlap after a resume."""

import time
from types import SimpleNamespace

from app.logger import RunLogger
from tests.app.helpers import scalars


def write(folder, resumed_step: int, steps: range, tag: str = "a") -> None:
    logger = RunLogger(folder, resumed_step)
    for step in steps:
        logger.trainer = SimpleNamespace(global_step=step)
        logger.log_metrics({tag: float(step), "epoch": 0.0}, step=7)
    logger.finalize("success")


def test_steps_are_the_trainers(tmp_path):
    write(tmp_path, 0, range(4))
    assert scalars(tmp_path) == {"a": [0, 1, 2, 3]}
    assert not (tmp_path / "hparams.yaml").exists()


def test_what_came_after_the_checkpoint_is_forgotten(tmp_path):
    write(tmp_path, 0, range(8))
    time.sleep(1)  # TensorBoard reads files in the order of their names, which begin with the second
    write(tmp_path, 5, range(6, 10))
    assert scalars(tmp_path) == {"a": list(range(10))}


def test_a_run_that_starts_anew_forgets_everything(tmp_path):
    write(tmp_path, 0, range(5))
    time.sleep(1)  # as above
    write(tmp_path, 0, range(3))
    assert scalars(tmp_path) == {"a": [0, 1, 2]}


def test_points_survive_a_kill_without_closing(tmp_path):
    logger = RunLogger(tmp_path, 0)
    logger.trainer = SimpleNamespace(global_step=1)
    logger.log_metrics({"a": 1.0})
    logger.save()
    assert scalars(tmp_path) == {"a": [1]}
