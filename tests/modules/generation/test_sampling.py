"""Distributions against transformers' logits processors, draws against counts."""

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from modules.errors import UserError
from modules.generation.sampling import Sampling, distribution, draw
from tests.modules.helpers import assert_close

CASES = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 5},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 500},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "top_p": 1e-18},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 2.5, "top_k": 50, "top_p": 0.5, "min_p": 0.3},
]


def logits(rows: int = 6, vocabulary: int = 100, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))


def of_transformers(scores: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0):
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    processors += [TopKLogitsWarper(top_k)] if top_k else []
    processors += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    processors += [MinPLogitsWarper(min_p)] if min_p else []
    return processors(torch.zeros(len(scores), 1, dtype=torch.int64), scores).softmax(-1)


def same(scores: torch.Tensor, case: dict) -> None:
    actual, expected = distribution(scores, Sampling(**case)), of_transformers(scores, **case)
    assert torch.equal(actual > 0, expected > 0)
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("vocabulary", "scale"), [(100, 3.0), (3000, 3.0), (3000, 0.1)])
def test_distribution_is_that_of_transformers(case: dict, vocabulary: int, scale: float) -> None:
    same(logits(vocabulary=vocabulary, scale=scale), case)


@pytest.mark.parametrize("case", [case for case in CASES if "top_p" not in case], ids=str)
def test_ties_stay_as_in_transformers(case: dict) -> None:
    same(logits().round(), case)


def test_ties_at_the_end_of_the_nucleus_stay() -> None:
    scores = torch.tensor([[1.0, 3.0, 1.0, 3.0, 3.0, 0.0]])
    assert (distribution(scores, Sampling(temperature=1.0, top_p=0.5)) > 0).tolist() == [
        [False, True] * 2 + [True, False]
    ]


@pytest.mark.parametrize("temperature", [1e-19, 1e-6, 1e30])
def test_extreme_temperatures_give_numbers(temperature: float) -> None:
    probabilities = distribution(logits() * 30, Sampling(temperature=temperature))
    assert_close(probabilities.sum(-1), torch.ones(len(probabilities)), 1e-5)


def test_a_temperature_that_fp32_cannot_divide_by_is_greedy() -> None:
    assert Sampling(temperature=1e-45).greedy
    assert not Sampling(temperature=1e-19).greedy


def test_a_row_does_not_depend_on_the_others() -> None:
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.05)
    together = distribution(logits(), sampling)
    for row, alone in enumerate(logits()):
        assert torch.equal(distribution(alone[None], sampling)[0], together[row])


def test_draws_follow_the_distribution() -> None:
    probabilities = distribution(logits(1, 12, 1.0), Sampling(temperature=1.5, top_k=9))
    draws = 20_000
    stream = Sampling(seed=3).stream((0,))
    drawn = draw(probabilities.expand(draws, -1), [stream.random() for _ in range(draws)])
    observed = torch.bincount(drawn, minlength=12) / draws
    deviation = (probabilities[0] * (1 - probabilities[0]) / draws).sqrt()
    assert ((observed - probabilities[0]).abs() <= 4 * deviation).all()


def test_a_draw_is_the_inverse_of_the_cumulative_sum() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    uniforms = [0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53]
    assert draw(probabilities.expand(6, -1), uniforms).tolist() == [1, 1, 3, 3, 4, 4]


def test_an_impossible_token_is_never_drawn() -> None:
    probabilities = logits(50, 3000, 1.0).softmax(-1)
    probabilities[:, 2000:] = 0
    assert draw(probabilities, [1 - 2**-53] * 50).max() < 2000


def test_streams_differ_by_seed_and_key() -> None:
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (10,), ()]
    firsts = {Sampling(seed=seed).stream(key).random() for seed in (0, 1) for key in keys}
    assert len(firsts) == 2 * len(keys)
    assert Sampling(seed=5).stream((1, 2)).random() == 0.17191404148102474, "the same on every machine"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2),
    ],
)
def test_mistakes_are_named(field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"^{field}: "):
        Sampling(**{field: value})
