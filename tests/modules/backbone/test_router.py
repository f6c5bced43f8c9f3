"""The router against loops over tokens and experts; the bias rule and the balance loss against their definitions."""

import pytest
import torch
from torch import Tensor

from modules.backbone.config import BackboneConfig
from modules.backbone.router import Router, Routing
from modules.objectives.next_token import sequence_auxiliary_loss
from tests.modules.helpers import ListData, assert_close, document_ids, fit, make_module, packed_batch, tiny_config

SETTINGS = {
    "plain": {},
    "top 1": {"num_experts_per_tok": 1},
    "all": {"num_experts_per_tok": 8},
    "raw": {"norm_topk_prob": False},
    "4 groups, 2 allowed": {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "4 groups, 1 allowed": {"n_group": 4, "topk_group": 1},
    "2 groups, 1 allowed": {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 4},
    "8 groups of one": {"n_group": 8, "topk_group": 3},
    "scaled": {"routed_scaling_factor": 7.0},
}


def make_router(config: BackboneConfig, bias: float = 0.3) -> Router:
    router = Router(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.weight.normal_(0, 0.3, generator=generator)
        router.e_score_correction_bias.normal_(0, bias, generator=generator)
    return router


def choose(scores: list[float], bias: list[float], config: BackboneConfig) -> dict[int, float]:
    """Weight by chosen expert of one token."""
    corrected = [score + shift for score, shift in zip(scores, bias, strict=True)]
    size = len(scores) // config.n_group
    groups = [list(range(start, start + size)) for start in range(0, len(scores), size)]
    groups.sort(key=lambda group: -sum(sorted((corrected[e] for e in group), reverse=True)[:2]))
    candidates = [expert for group in groups[: config.topk_group] for expert in group]
    chosen = sorted(candidates, key=lambda expert: -corrected[expert])[: config.num_experts_per_tok]
    total = sum(scores[expert] for expert in chosen) if config.norm_topk_prob else 1.0
    return {expert: scores[expert] / total * config.routed_scaling_factor for expert in chosen}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS.keys())
def test_equals_a_loop(changes: dict) -> None:
    config = tiny_config(**changes)
    router = make_router(config)
    x = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(1))
    weights, experts, routing = router(x)
    scores = (x @ router.weight.T).sigmoid()
    counts = torch.zeros(2, 8, dtype=torch.int64)
    for row in range(2):
        for t in range(11):
            expected = choose(scores[row, t].tolist(), router.e_score_correction_bias.tolist(), config)
            actual = dict(zip(experts[row, t].tolist(), weights[row, t].tolist(), strict=True))
            assert actual == pytest.approx(expected, rel=1e-5)
            for expert in expected:
                counts[row, expert] += 1
            share = scores[row, t] / scores[row, t].sum()
            assert_close(routing.probabilities[row, t], share, 1e-5)
    assert torch.equal(routing.counts, counts)
    assert weights.dtype == routing.probabilities.dtype == torch.float32
    assert experts.dtype == routing.counts.dtype == torch.int64


def test_bias_selects_and_never_weighs() -> None:
    """A bias that changes no choice changes no number; one that does decides alone who is chosen."""
    router = make_router(tiny_config(norm_topk_prob=False, num_experts_per_tok=3), bias=0.0)
    x = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(1))
    scores = (x @ router.weight.T).sigmoid()
    router.e_score_correction_bias += 64.0
    shifted, experts, _ = router(x)
    assert_close(shifted, 2.5 * scores.gather(-1, experts), 1e-5)
    router.e_score_correction_bias[[1, 4, 6]] += 1.0
    weights, experts, _ = router(x)
    assert (experts.sort(-1).values == torch.tensor([1, 4, 6])).all()
    assert_close(weights, 2.5 * scores.gather(-1, experts), 1e-5)


def test_gradient_flows_through_the_weights_only() -> None:
    router = make_router(tiny_config())
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weights, _, _ = router(x)
    (weights * torch.tensor([1.0, -1.0])).sum().backward()
    assert router.weight.grad.abs().max() > 0
    assert x.grad.abs().max() > 0
    assert not router.e_score_correction_bias.requires_grad


def test_computes_in_fp32_from_bf16() -> None:
    router = make_router(tiny_config())
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    for low, full in zip(router(x)[:2], router(x.float())[:2], strict=True):
        assert torch.equal(low, full)


def balance(routing: Routing) -> float:
    """DeepSeek-V3, equations 17 to 20, summed over rows: f_i = E / (K T) x tokens sent to i; P_i = mean score share."""
    total = 0.0
    for counts, probabilities in zip(routing.counts, routing.probabilities, strict=True):
        experts, chosen = len(counts), counts.sum().item()
        for expert in range(experts):
            frequency = experts * counts[expert].item() / chosen
            total += frequency * sum(p.item() for p in probabilities[:, expert]) / len(probabilities)
    return total


def test_auxiliary_loss_equals_its_definition() -> None:
    config = tiny_config(num_experts_per_tok=3)
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1))
    routings = [make_router(config, bias)(x)[2] for bias in (0.0, 1.0)]
    loss = sequence_auxiliary_loss(routings)
    assert loss.item() == pytest.approx(sum(map(balance, routings)), rel=1e-5)
    assert loss.requires_grad


def test_auxiliary_loss_is_one_for_even_load_and_experts_for_one_expert() -> None:
    even = Routing(torch.full((1, 4, 8), 1 / 8), torch.full((1, 8), 2))
    alone = Routing(torch.eye(8)[:1].expand(1, 4, 8), torch.eye(8, dtype=torch.int64)[:1] * 8)
    assert sequence_auxiliary_loss([even]).item() == pytest.approx(1.0)
    assert sequence_auxiliary_loss([alone]).item() == pytest.approx(8.0)


@pytest.mark.parametrize("rate", [1e-3, 0.5])
def test_bias_moves_towards_even_load_once_a_step(rate: float) -> None:
    """b_i += rate x sign(mean load - load of i), with the load of the whole window; here of two micro-batches."""
    batches = [packed_batch(document_ids([12, 12], [24]), 64, seed=seed) for seed in (0, 1)]
    module = make_module(expert_bias_rate=rate)
    loads: list[Tensor] = []
    original = module.micro_batch_loss

    def recording(batch, totals):
        result = original(batch, totals)
        loads.append(torch.stack([routing.counts.sum(0) for routing in result.router]))
        return result

    module.micro_batch_loss = recording
    fit(module, ListData(batches, window=2))
    load = sum(loads)
    assert len(loads) == 2
    assert (load[0] != load[0].float().mean()).any()
    for router, counts in zip(module.built_network.routers(), load.tolist(), strict=True):
        mean = sum(counts) / len(counts)
        expected = [rate * ((mean > count) - (mean < count)) for count in counts]
        assert router.e_score_correction_bias.tolist() == pytest.approx(expected, rel=1e-6)
        assert router.e_score_correction_bias.dtype == torch.float32
