"""Both sides of the benchmark train the same model: their losses agree before and after a step."""

import pytest
import torch

from benchmarks import training_step
from tests.modules.helpers import tiny_config


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_both_sides_take_the_same_steps(monkeypatch, precision: str, tolerance: float):
    monkeypatch.setattr(training_step, "CONFIG", tiny_config(num_nextn_predict_layers=0))
    tokens = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(0))
    ours, theirs = (
        training_step.build_step(side, precision, tokens) for side in (training_step.OURS, training_step.THEIRS)
    )
    for _ in range(3):
        assert float(ours()) == pytest.approx(float(theirs()), rel=tolerance)
