"""Sampling against a plain loop over one prompt."""

import pytest
import torch

from modules.generation.sampling import sample
from tests.modules.helpers import make_network, tiny_config

PROMPTS = [[3, 14, 15], [9], [2, 6, 5, 3, 5, 8, 9]]


@pytest.fixture(scope="module")
def network():
    return make_network(tiny_config()).eval()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def greedy(network, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        logits = network.logits(network(torch.tensor([tokens])).hidden[0, -1])
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_equals_an_argmax_loop(network, prompt: list[int]) -> None:
    assert sample(network, [prompt], 9, 0.0, generator()) == [greedy(network, prompt, 9)]


def test_prompts_of_unequal_length_equal_single_prompts(network) -> None:
    together = sample(network, PROMPTS, 7, 0.0, generator())
    assert together == [greedy(network, prompt, 7) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in together}) > 1


def test_a_seed_repeats_and_another_differs(network) -> None:
    first, again, other = (sample(network, PROMPTS, 12, 1.0, generator(seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_frequencies_follow_the_tempered_distribution(network) -> None:
    prompt, temperature, draws = [3, 14, 15], 2.0, 4000
    with torch.no_grad():
        logits = network.logits(network(torch.tensor([prompt])).hidden[0, -1])
    expected = (logits / temperature).softmax(-1)
    drawn = [tokens[0] for tokens in sample(network, [prompt] * draws, 1, temperature, generator())]
    observed = torch.bincount(torch.tensor(drawn), minlength=64) / draws
    assert (observed - expected).abs().max() < 5 * (0.25 / draws) ** 0.5
    assert (observed - logits.softmax(-1)).abs().sum() > 2 * (observed - expected).abs().sum(), "temperature counts"


def test_nothing_to_add(network) -> None:
    assert sample(network, PROMPTS, 0, 0.0, generator()) == [[], [], []]


def test_leaves_the_mode_and_no_gradient(network) -> None:
    network.train()
    sample(network, PROMPTS[:1], 2, 0.0, generator())
    assert network.training
    network.eval()
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(("prompts", "temperature", "key"), [([[1], []], 0.0, "prompt"), ([[1]], -0.5, "temperature")])
def test_mistakes_are_named(network, prompts: list[list[int]], temperature: float, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        sample(network, prompts, 3, temperature, generator())
