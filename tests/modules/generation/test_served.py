"""Every way of generating with a network run as served, keys and values in FP8, agrees with its full forward pass."""

import pytest
import torch

from modules.backbone.attention import Attention
from modules.backbone.model import Network
from modules.generation import native
from modules.generation.engine import Request, generate
from modules.generation.native import NativeLayers
from modules.generation.runner import Runner
from modules.generation.sampling import Sampling
from modules.generation.scoring import score
from modules.generation.session import Session
from modules.precision.linear import GroupedLinear, Head, Linear
from modules.precision.quantized import quantize_weight, tensor_scale
from modules.precision.quantized_product import install
from tests.modules.helpers import make_network, tiny_config

WARM = Sampling(temperature=1.3, top_k=30, top_p=0.95, seed=7)
PROMPTS = [[3, 14, 15], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2], list(range(50)), [1, 2, 3, 4, 5, 6]]
NEAR = 0.005
"""Nats, the median: sums in another order now and then move a number to the next one of its format, and what follows
then differs by far more; a network that is served otherwise differs everywhere."""


def make(kv_scales: tuple[float, float] | None = (0.001, 0.001)) -> Network:
    """NVFP4 where its blocks fit, FP8 in o_proj and elsewhere, the head and the MTP block's eh_proj plain."""
    network = make_network(tiny_config()).eval().requires_grad_(False)
    for name, module in network.named_modules():
        if isinstance(module, Attention):
            module.kv_scales = kv_scales
        if not isinstance(module, Linear | GroupedLinear) or isinstance(module, Head) or name.endswith("eh_proj"):
            continue
        weight, fits = module.weight, module.weight.shape[-1] % 16 == 0 and not name.endswith("o_proj")
        chosen = "nvfp4" if fits else "fp8"
        scale = tensor_scale(torch.tensor(4.0), chosen)
        matrices = weight if weight.ndim == 3 else weight[None]
        install(module, [quantize_weight(matrix, chosen, input_scale=scale) for matrix in matrices])
    return network


@pytest.fixture(scope="module")
def network() -> Network:
    return make()


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return (actual - expected).abs().median().item()


@torch.no_grad()
def full_logprobs(network: Network, tokens: list[int]) -> torch.Tensor:
    logits = network.logits(network(torch.tensor([tokens[:-1]])).hidden[0])
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def test_the_c_code_is_for_other_networks(network) -> None:
    assert Runner(network, 1, 8).native is None
    assert Runner(network, 1, 8, mtp=True).native is None
    plain = make_network(tiny_config()).eval()
    assert (Runner(plain, 1, 8).native is None) == (native.load()[0] is None)
    plain.backbone.layers[2].mixer.kv_scales = (1.0, 1.0)
    assert Runner(plain, 1, 8).native is None, "FP8 keys and values alone"
    assert (Runner(plain, 1, 8, mtp=True).native is None) == (native.load()[0] is None), "they are not the MTP block's"


def test_nor_is_it_for_layers_that_are_all_served_alike() -> None:
    network = make_network(tiny_config(hybrid_override_pattern="--")).eval()
    layers = network.backbone.layers
    for module in layers.modules():
        if isinstance(module, Linear):
            install(module, [quantize_weight(module.weight, "nvfp4")])
    assert not NativeLayers.fits(layers, torch.float32)


@pytest.mark.parametrize("options", [{}, {"batch_size": 1}, {"prefill_tokens": 12}, {"draft_tokens": 2}], ids=str)
def test_generated_logprobs_are_those_of_the_full_pass(network, options) -> None:
    requests = [Request(tokens=prompt, max_new_tokens=16, key=(number,)) for number, prompt in enumerate(PROMPTS)]
    completions = list(generate(network, requests, WARM, logprobs=True, **options))
    found = torch.tensor([completion.logprobs for completion in completions])

    def full(other: Network) -> torch.Tensor:
        rows = [(prompt, prompt + done.tokens) for prompt, done in zip(PROMPTS, completions, strict=True)]
        return torch.stack([full_logprobs(other, tokens)[len(prompt) - 1 :] for prompt, tokens in rows])

    assert distance(found, full(network)) < NEAR
    assert distance(found, full(make(kv_scales=None))) > 4 * NEAR


def test_chat_goes_on_from_its_cache(network) -> None:
    session = Session(network, WARM, (), lambda tokens: "".join(chr(40 + token) for token in tokens))
    tokens = list[int]()
    for turn in range(3):
        tokens = [*tokens, 11, 20 + turn, 30]
        list(session.reply(tokens, 8))
        tokens = session.tokens
    assert len(tokens) == 3 * 11


def test_scores_in_pieces_are_those_in_one(network) -> None:
    rows = [[*prompt, *range(20)] for prompt in PROMPTS]
    other = make(kv_scales=None)
    for index, scores in score(network, rows, other, batch_tokens=30):
        assert distance(scores.logprobs, full_logprobs(network, rows[index])) < NEAR
        assert distance(scores.logprobs, full_logprobs(other, rows[index])) > 4 * NEAR
        assert scores.kl is not None
        assert scores.kl.mean() > 0.001
