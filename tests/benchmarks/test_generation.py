"""Both sides of the benchmark write the same tokens, and its figures are what they say."""

from pathlib import Path

import pytest

from benchmarks import generation, training_step
from modules.precision.recipe import PrecisionConfig
from tests.modules.helpers import tiny_config


@pytest.fixture
def folder(monkeypatch):
    monkeypatch.setattr(training_step, "CONFIG", tiny_config(num_nextn_predict_layers=0))
    with generation.staged(None, "fp32") as path:
        yield path


@pytest.mark.parametrize("implementation", generation.IMPLEMENTATIONS)
def test_both_sides_write_the_same_tokens(folder: Path, implementation: str):
    prompts = generation.random_prompts(3, 9)
    prompts = [[token % 64 for token in prompt] for prompt in prompts]
    mine = generation.ours(folder, prompts)(12)
    assert [len(row) for row in mine] == [12] * 3
    assert mine == generation.theirs(folder, prompts, implementation)(12)
    network = training_step.our_network(PrecisionConfig(recipe="fp32"), training_step.CONFIG)
    assert generation.parameters(folder) == sum(x.numel() for x in network.state_dict().values())


def test_agreement_ends_at_the_first_difference():
    assert generation.agreement([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 3, 4], [5, 0, 7, 8]]) == 5 / 8


def test_sides_that_differ_are_not_compared():
    generation.check_first_tokens([[1], [2]], [[1], [2]], "fp32")
    generation.check_first_tokens([[1], [2]], [[1], [3]], "bf16")
    with pytest.raises(SystemExit, match="1 of 2 first tokens"):
        generation.check_first_tokens([[1], [2]], [[1], [3]], "fp32")
