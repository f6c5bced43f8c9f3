"""What is counted as keys and values is what a cache holds, and a command that fails is no measurement."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.prompt_memory import keys_and_values, peak, text_of
from modules.backbone.cache import AttentionState
from modules.checkpoints.names import TensorInfo
from tests.modules.helpers import make_network, tiny_config


def test_keys_and_values_are_those_of_a_cache():
    config = tiny_config(hybrid_override_pattern="M*E*")
    tensors = {"backbone.layers.1.mixer.k_proj.weight": TensorInfo((16, 32), torch.float32)}
    states = make_network(config).new_cache(rows=1, capacity=77).states
    held = sum(state.size() for state in states if isinstance(state, AttentionState))
    assert keys_and_values(SimpleNamespace(config=config, tensors=tensors), 77) == held  # type: ignore[arg-type]


def test_a_text_is_hardly_longer_than_asked():
    words = SimpleNamespace(encode=str.split)
    for length in (1, 16, 1000):
        assert length <= len(text_of(length, words).split()) < length + 16  # type: ignore[arg-type]


def test_a_command_that_fails_is_no_measurement(tmp_path: Path):
    with pytest.raises(SystemExit, match=r"score failed: error: .*nothing does not exist"):
        peak("score", tmp_path / "nothing", "text", tmp_path)
