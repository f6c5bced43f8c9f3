import json
import math
import os

import pytest

from datamodules.text.workers import Workers
from datamodules.tokenizer import Tokenizer
from modules.errors import UserError


@pytest.mark.parametrize("count", [1, 2])
def test_every_job_has_its_result(count: int):
    with Workers(count) as workers:
        for size in (0, 1, 7):
            assert dict(workers.run(math.factorial, list(range(size)))) == {n: math.factorial(n) for n in range(size)}


def test_a_mistake_arrives_as_one_and_a_defect_as_another():
    with Workers(2) as workers:
        with pytest.raises(UserError, match=r"^tokenizer: nowhere is not a folder") as mistake:
            list(workers.run(Tokenizer.load, ["nowhere", "nowhere"]))
        assert mistake.value.__cause__ is None
        with pytest.raises(json.JSONDecodeError):
            list(workers.run(json.loads, ["{", "{"]))


def test_a_killed_worker_is_named():
    with Workers(2) as workers, pytest.raises(UserError, match=r"^workers: a worker process was killed"):
        list(workers.run(os._exit, [1, 1]))
