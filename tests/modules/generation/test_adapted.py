"""Decoding with adapters beside the weights is decoding with merged weights: C code and portable, drafts too."""

import copy

import pytest
import torch

from modules.backbone.model import Network
from modules.generation import native
from modules.generation.engine import Request, generate
from modules.generation.native import NativeLayers
from modules.generation.sampling import Sampling
from modules.precision.formats import Format
from modules.precision.linear import FormattedModule
from tests.modules.adapted import make_adapted, merged
from tests.modules.generation.test_served import serve
from tests.modules.helpers import assert_close, relative_error

PROMPTS = [[3, 14, 15], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2]]


@pytest.fixture(params=["C code", "portable"])
def code(request, monkeypatch):
    if request.param == "portable":
        monkeypatch.setattr(native, "load", lambda: (None, "switched off"))
    elif native.load()[0] is None:
        pytest.skip(native.load()[1])
    return request.param


def in_format(network: Network, chosen: Format) -> Network:
    """A copy to decode with, weights and adapters in a format's dtype."""
    network = copy.deepcopy(network).eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, FormattedModule):
            module.format = chosen
            module.to(module.compute_dtype)
    return network


def decode(network: Network, tokens: torch.Tensor, code: str) -> torch.Tensor:
    """Logits [B, T, V] of positions that come one after the other, as in decoding."""
    rows, length = tokens.shape
    cache = network.new_cache(rows, length)
    layers = NativeLayers.describe(network, cache, torch.float32, mtp=False)
    assert (layers is not None) == (code == "C code")
    hidden = []
    for place in range(length):
        step = tokens[:, place : place + 1]
        hidden.append(network(step, cache=cache).hidden if layers is None else layers.run(step, None, False, True))
    return network.logits(torch.cat(hidden, 1))


@pytest.mark.parametrize("rows", [1, 3, 12])
@torch.no_grad()
def test_decoding_in_fp32_is_that_of_the_merged_weights(code, rows):
    network = in_format(make_adapted(), "fp32")
    tokens = torch.randint(0, 64, (rows, 9), generator=torch.Generator().manual_seed(rows))
    plain = merged(network)
    wanted = plain.logits(plain(tokens).hidden)
    assert_close(decode(network, tokens, code), wanted, 1e-5)
    without = copy.deepcopy(network)
    for module in without.modules():
        if hasattr(module, "adapter"):
            module.adapter = None
    assert relative_error(decode(without, tokens, code), wanted) > 0.1, "the adapters matter"


@torch.no_grad()
def test_decoding_in_bf16_is_as_near_as_the_forward_pass(code):
    network = make_adapted()
    tokens = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    exact, low = in_format(network, "fp32"), in_format(network, "bf16")
    exact = in_format(merged(exact), "fp32")
    wanted = exact.logits(exact(tokens).hidden)
    forward = (low.logits(low(tokens).hidden) - wanted).square().mean().sqrt()
    assert 0 < (decode(low, tokens, code) - wanted).square().mean().sqrt() <= 2 * forward


@pytest.mark.parametrize("draft_tokens", [0, 2])
def test_generation(code, draft_tokens):
    """The same tokens as of the merged weights, and their log-probabilities; eh_proj and the MTP block are adapted."""
    network = in_format(make_adapted(), "fp32")
    requests = [Request(tokens=prompt, max_new_tokens=12, key=(n,)) for n, prompt in enumerate(PROMPTS)]
    options = {"draft_tokens": draft_tokens, "logprobs": True}
    for batch_size in (1, 3):
        found, wanted = (
            list(generate(model, requests, Sampling(temperature=0), batch_size=batch_size, **options))
            for model in (network, merged(network))
        )
        assert [one.tokens for one in found] == [one.tokens for one in wanted]
        assert [one.accepted for one in found] == [one.accepted for one in wanted]
        for own, other in zip(found, wanted, strict=True):
            assert own.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@torch.no_grad()
def test_over_a_quantised_base(code):
    """Base as it is served, adapters beside it: the C code and the portable pass agree; adapters see plain inputs."""
    network = serve(in_format(make_adapted(), "bf16"), lambda name: "nvfp4" if "mixer" in name else "bf16")
    tokens = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    wanted = network.logits(network(tokens).hidden)
    found = decode(network, tokens, code)
    assert (found - wanted).abs().median() < 0.02 * wanted.abs().max()
