"""Every way of generating with a network run as served, keys and values in FP8, agrees with its full forward pass."""

import zlib
from collections.abc import Callable

import pytest
import torch

from modules.backbone.attention import Attention
from modules.backbone.cache import AttentionState
from modules.backbone.mamba import Mamba2
from modules.backbone.model import Network
from modules.generation import native
from modules.generation.engine import Request, generate
from modules.generation.native_round import NativeRounds
from modules.generation.runner import Runner
from modules.generation.sampling import Sampling
from modules.generation.scoring import score
from modules.generation.session import Session
from modules.precision.linear import FormattedModule, GroupedLinear, Linear
from modules.precision.quantized import quantize_weight, tensor_scale
from modules.precision.quantized_product import install
from tests.modules.helpers import make_network, tiny_config

WARM = Sampling(temperature=1.3, top_k=30, top_p=0.95, seed=7)
PROMPTS = [[3, 14, 15], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2], list(range(50)), [1, 2, 3, 4, 5, 6]]
NEAR = 0.005
"""Nats, the median: sums in another order now and then move a number to the next one of its format, and what follows
then differs by far more; a network that is served otherwise differs everywhere."""


def serve(network: Network, choose: Callable[[str], str], kv_scales: tuple[float, float] | None = None) -> Network:
    """Give each module what `choose` says of its name: fp32, bf16, nvfp4, fp8, or w4a16 (nvfp4 without inputs).

    Inputs beyond 4 saturate; those of each expert have a scale of their own. FP8 where blocks of NVFP4 do not fit.
    """
    network.eval().requires_grad_(False)
    for name, module in network.named_modules():
        if isinstance(module, Attention):
            module.kv_scales = kv_scales
        if not isinstance(module, FormattedModule):
            continue
        chosen, weight = choose(name), module.weight
        if chosen in ("fp32", "bf16"):
            module.format = chosen
            module.to(module.compute_dtype)
            continue
        assert isinstance(module, Linear | GroupedLinear)
        kind = "nvfp4" if chosen != "fp8" and weight.shape[-1] % 16 == 0 else "fp8"
        scales = [tensor_scale(torch.tensor(4.0 + expert), kind) for expert in range(len(weight))]
        inputs = [None if kind == "nvfp4" and chosen == "w4a16" else scale for scale in scales]
        matrices = zip(weight if weight.ndim == 3 else weight[None], inputs, strict=False)
        install(module, [quantize_weight(matrix, kind, input_scale=scale) for matrix, scale in matrices])
    return network


def make(kv_scales: tuple[float, float] | None = (0.001, 0.001)) -> Network:
    """NVFP4 where its blocks fit, FP8 in o_proj and elsewhere; head, embedding and the MTP block's eh_proj plain."""

    def choose(name: str) -> str:
        if name.endswith(("embeddings", "lm_head", "eh_proj")):
            return "fp32"
        return "fp8" if name.endswith("o_proj") else "nvfp4"

    return serve(make_network(tiny_config()), choose, kv_scales)


def mixture(stream: str, linears: str, head: str) -> Callable[[str], str]:
    """Choose for `serve`: one format for all linear layers, or `any`: for each one of all, by its name."""

    def choose(name: str) -> str:
        if name.endswith(("embeddings", "lm_head")):
            return head if name == "lm_head" else stream
        every = ("fp32", "bf16", "w4a16", "nvfp4", "fp8")
        return every[zlib.crc32(name.encode()) % len(every)] if linears == "any" else linears

    return choose


MIXTURES = {
    "NVFP4": mixture("bf16", "nvfp4", "bf16"),
    "NVFP4 weights": mixture("bf16", "w4a16", "bf16"),
    "FP8, the head too": mixture("bf16", "fp8", "fp8"),
    "NVFP4 in an fp32 stream, the head too": mixture("fp32", "nvfp4", "nvfp4"),
    "any": mixture("bf16", "any", "fp32"),
    "any in fp32": mixture("fp32", "any", "bf16"),
}
BARE = {"moe_latent_size": None, "moe_shared_expert_intermediate_size": 0}
LAYERS = {"M": {}, "*": {}, "* in FP8": {}, "E": {}, "E without latent and shared expert": BARE, "-": {}}


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


needs_compiler = pytest.mark.skipif(native.load()[0] is None, reason="no C compiler")


@needs_compiler
@pytest.mark.parametrize(("layer", "changes"), LAYERS.items(), ids=LAYERS.keys())
@pytest.mark.parametrize("choose", MIXTURES.values(), ids=MIXTURES.keys())
@torch.no_grad()
def test_passes_in_c_are_those_in_torch(choose, layer: str, changes: dict) -> None:
    """Prompts, single steps, drafts that are held and taken over in part, the MTP block, logits; of one layer, behind
    which few numbers have come to the other side of a border between two of their format. torch attends in bf16."""
    config = tiny_config(hybrid_override_pattern=layer[0], mtp_hybrid_override_pattern=layer[0], **changes)
    network = serve(make_network(config), choose, (0.01, 0.03) if "FP8" in layer else None)
    tokens = torch.randint(64, (3, 32), generator=torch.Generator().manual_seed(0))

    near = 1e-2 if layer[0] == "*" else 1e-5

    def run(in_c: bool) -> list[torch.Tensor]:
        runners = [Runner(network, 3, 40, mtp=mtp) for mtp in (False, True)]
        assert all(runner.native is not None for runner in runners)
        if not in_c:
            for runner in runners:
                runner.native = None
        parts = []
        for start, end, hold in ((0, 17, False), (17, 18, False), (18, 22, True), (22, 26, False), (26, 27, False)):
            parts.append(runners[0].run(tokens[:, start:end], hold=hold))
            parts.append(runners[1].run(tokens[:, start + 1 : end + 1], parts[-1], hold=hold))
            if hold:
                for runner in runners:
                    runner.advance([4, 0, 2])
        states = [state for state in runners[0].cache.states if isinstance(state, AttentionState)]
        kept = [kind.float() for state in states for kind in (state.keys, state.values)]
        return [torch.cat(parts[0::2], 1), torch.cat(parts[1::2], 1), *kept]

    mine, others = run(in_c=True), run(in_c=False)
    for hidden, other in zip(mine[:2], others[:2], strict=True):
        assert hidden.dtype == other.dtype == network.backbone.embeddings.compute_dtype
        assert distance(hidden, other) <= near
        assert distance(hidden, other.roll(1, 0)) > 0.3
        assert distance(network.logits(hidden), network.logits(other)) <= near
    for kept, other in zip(mine[2:], others[2:], strict=True):
        assert (kept != other).float().mean() < 0.02 if "FP8" in layer else distance(kept, other) < near


@needs_compiler
@torch.no_grad()
def test_what_a_network_is_served_in_reaches_the_c_code() -> None:
    """Each difference in how it is served moves the results further than rounding does."""
    tokens = torch.randint(64, (3, 32), generator=torch.Generator().manual_seed(0))

    def run(linears: str, kv_scales: tuple[float, float] | None = None) -> torch.Tensor:
        runner = Runner(serve(make_network(tiny_config()), mixture("fp32", linears, "fp32"), kv_scales), 3, 40)
        assert runner.native is not None
        return runner.run(tokens)

    served = run("nvfp4")
    for other in (run("bf16"), run("w4a16"), run("fp8"), run("nvfp4", (0.001, 1.0)), run("nvfp4", (1.0, 0.001))):
        assert distance(served, other) > 2 * NEAR


@needs_compiler
def test_no_weight_is_held_twice(network) -> None:
    runner = Runner(network, 1, 8)
    assert runner.native is not None
    mixers = [layer.mixer for layer in network.backbone.layers]
    firsts = [mixer.in_proj for mixer in mixers if isinstance(mixer, Mamba2)]
    held = [one.products[0] for one in runner.native.arguments if chr(one.kind) == "M"]
    assert firsts
    assert [one.weight for one in held] == [module.weight.data_ptr() for module in firsts]
    assert {module.weight.dtype for module in firsts} == {torch.bfloat16}
    described, owned = runner.native._tensors[0], {parameter.data_ptr() for parameter in network.parameters()}
    assert all(tensor.data_ptr() in owned for tensor in described if tensor.ndim > 1)


@needs_compiler
@pytest.mark.parametrize("linears", ["nvfp4", "any"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, seed=5)], ids=["greedy", "sampled"])
def test_rounds_of_drafts_run_in_c(linears: str, sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    network = serve(make_network(tiny_config()), mixture("fp32", linears, "fp8"), (0.01, 0.03))
    work = [Request(tokens=prompt, max_new_tokens=14, key=(number,)) for number, prompt in enumerate(PROMPTS)]
    verify, rounds = NativeRounds.verify, []
    monkeypatch.setattr(NativeRounds, "verify", lambda *given: rounds.append(verify(*given)) or rounds[-1])
    fast = list(generate(network, work, sampling, batch_size=1, draft_tokens=2))
    assert rounds == [count for one in fast for count in one.accepted]
    monkeypatch.setattr(NativeRounds, "fits", lambda *given: False)
    slow = list(generate(network, work, sampling, batch_size=1, draft_tokens=2))
    same = sum(one.tokens[:3] == other.tokens[:3] for one, other in zip(fast, slow, strict=True))
    assert same >= len(PROMPTS) - 1  # a number at the border of two of its format may fall to either side


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
