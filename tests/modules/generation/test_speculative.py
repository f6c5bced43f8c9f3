"""Speculative decoding against loops that compute everything anew, and against the distribution it must draw from.

Vocabularies are tiny, so that an untrained MTP block is right often enough for every number of kept drafts to occur.
"""

import itertools
import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from modules.backbone.model import Network
from modules.errors import UserError
from modules.generation import native, speculative
from modules.generation.decoding import Decoding, Row
from modules.generation.engine import Completion, Request, generate
from modules.generation.native_round import NativeRounds
from modules.generation.sampling import Sampling, distribution
from modules.generation.speculative import SpeculativeDecoder, Verdict, verify_by_rejection
from modules.precision.linear import FormattedModule
from tests.modules.helpers import BF16, FP32, make_network, tiny_config

GREEDY = Sampling()
NETWORKS = [
    ("ME*-ME", "*E", 4),
    ("MM", "ME", 10),
    ("*-", "-", 1),
    ("M*E", "M", 7),
    ("EM", "*", 2),
    ("M-*", "*EM-", 4),
]
"""(pattern, MTP pattern, seed): seeds whose MTP block happens to be right rather often."""
VOCABULARY = 3


def make(pattern: str = "ME*-ME", mtp: str = "*E", vocab_size: int = VOCABULARY, seed: int = 0) -> Network:
    config = tiny_config(vocab_size=vocab_size, hybrid_override_pattern=pattern, mtp_hybrid_override_pattern=mtp)
    return make_network(config, seed=seed).eval()


def prompts(count: int, seed: int, vocab_size: int = VOCABULARY) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(vocab_size) for _ in range(source.randrange(1, 30))] for _ in range(count)]


def ask(texts: list[list[int]], count: int) -> list[Request]:
    return [Request(tokens=tokens, max_new_tokens=count, key=(number,)) for number, tokens in enumerate(texts)]


@torch.no_grad()
def greedy(network: Network, prompt: list[int], count: int) -> list[int]:
    """Continue by a full forward pass for each token; the choices must be clear of rounding."""
    tokens = list(prompt)
    for _ in range(count):
        logits = network.logits(network(torch.tensor([tokens])).hidden[0, -1])
        first, second = logits.topk(2).values.tolist()
        assert first - second > 1e-4, "another seed"
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


@torch.no_grad()
def kept_drafts(network: Network, prompt: list[int], written: list[int], length: int) -> list[int]:
    """Return how many drafts each round keeps whose outcome is `written`; the MTP block runs over all of its past."""
    seen, kept = 1, []
    assert network.mtp is not None
    while seen < len(written):
        tokens = prompt + written[:seen]
        hidden = network(torch.tensor([tokens[:-1]])).hidden
        ahead, drafts = torch.tensor([tokens[1:]]), []
        embedded = network.backbone.embeddings(ahead)
        state = network.mtp(embedded, hidden, None)[0][:, -1:]
        for _ in range(length):
            drafts.append(int(network.logits(state).argmax()))
            newest = network.backbone.embeddings(torch.tensor([drafts[-1:]]))
            inputs = torch.cat([embedded, newest], 1), torch.cat([hidden, state], 1)
            state = network.mtp(*inputs, None)[0][:, -1:]
        wanted = written[seen : seen + length]
        right = [draft == token for draft, token in zip(drafts, wanted, strict=False)]
        kept.append(sum(itertools.takewhile(bool, right)))
        seen += kept[-1] + 1
    return kept


@pytest.mark.parametrize(("pattern", "mtp", "seed"), NETWORKS)
def test_greedy_equals_plain_greedy_for_every_draft_length(pattern: str, mtp: str, seed: int) -> None:
    network, texts = make(pattern, mtp, seed=seed), prompts(4, seed=len(pattern))
    expected = [greedy(network, prompt, 12) for prompt in texts]
    for length in range(1, 8):
        found = generate(network, ask(texts, 12), GREEDY, batch_size=3, draft_tokens=length, prefill_tokens=8 * length)
        assert [completion.tokens for completion in found] == expected


@pytest.mark.parametrize(("pattern", "mtp", "seed"), NETWORKS)
def test_drafts_are_those_of_an_mtp_block_that_has_seen_the_true_text(pattern: str, mtp: str, seed: int) -> None:
    """So the right number of them is kept."""
    network, texts = make(pattern, mtp, seed=seed), prompts(3, seed=len(pattern))
    for length in (1, 3):
        found = generate(network, ask(texts, 12), GREEDY, batch_size=2, draft_tokens=length, prefill_tokens=16)
        for completion, prompt in zip(found, texts, strict=True):
            kept = kept_drafts(network, prompt, completion.tokens, length)
            # What the last round keeps may lie beyond the end.
            assert completion.accepted[:-1] == kept[:-1]
            assert completion.accepted[-1] >= kept[-1]


def test_every_number_of_kept_drafts_occurs() -> None:
    """Otherwise the tests here would say little."""
    kept = Counter()
    for pattern, mtp, seed in NETWORKS:
        network, texts = make(pattern, mtp, seed=seed), prompts(4, seed=len(pattern))
        for completion in generate(network, ask(texts, 12), GREEDY, draft_tokens=3):
            kept.update(completion.accepted)
    assert min(kept[count] for count in range(4)) >= 5, kept


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, seed=3)], ids=["greedy", "sampled"])
def test_a_row_does_not_depend_on_its_batch(sampling: Sampling) -> None:
    network = make()
    work = ask(prompts(9, seed=1), 20)
    alone, together = (
        list(generate(network, work, sampling, batch_size=size, draft_tokens=3, logprobs=True)) for size in (1, 9)
    )
    for one, other in zip(alone, together, strict=True):
        assert (one.tokens, one.accepted, one.finish) == (other.tokens, other.accepted, other.finish)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert len({tuple(completion.accepted) for completion in together}) > 3


def test_ends_where_plain_decoding_ends() -> None:
    network, texts = make(vocab_size=12), prompts(12, seed=2, vocab_size=12)
    work = [Request(tokens=prompt, max_new_tokens=number) for number, prompt in enumerate(texts)]
    words = "abcdefghijkl"

    def complete(length: int) -> list[Completion]:
        return list(
            generate(
                network,
                work,
                GREEDY,
                eos_ids=(3,),
                decode=lambda tokens: "".join(words[token] for token in tokens),
                stop=("ba", "ll", "g"),
                draft_tokens=length,
                logprobs=True,
            )
        )

    plain = complete(0)
    assert {completion.finish for completion in plain} == {"eos", "stop", "length"}
    for length in (1, 2, 5, 30):
        for found, expected in zip(complete(length), plain, strict=True):
            assert (found.tokens, found.text, found.finish) == (expected.tokens, expected.text, expected.finish)
            assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_drafts_of_a_part_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens outside are never drafted; the output stays."""
    monkeypatch.setattr(speculative, "DRAFTED_LEAST", 2)
    network, texts = make(), prompts(5, seed=3)
    shapes = set()
    handle = network.lm_head.register_forward_hook(lambda module, inputs, output: shapes.add(output.shape[-1]))
    found = list(generate(network, ask(texts, 12), GREEDY, draft_tokens=2))
    handle.remove()
    assert [completion.tokens for completion in found] == [greedy(network, prompt, 12) for prompt in texts]
    assert shapes == {2, VOCABULARY}
    for completion in found:
        place = 1
        for kept in completion.accepted[:-1]:
            assert all(token < 2 for token in completion.tokens[place : place + kept])
            place += kept + 1


# ---------------------------------------------------------------------------------------------------------- sampling


def surprise(counts: Tensor, expected: Tensor) -> float:
    """Return by how many standard deviations a chi-square statistic exceeds its mean; cells of less than 5 are merged.

    Args:
        counts: [cells], observed.
        expected: [cells], with the same sum.
    """
    rare = expected < 5
    counts, expected = (
        torch.cat([cells[~rare], cells[rare].sum().view(1)]) for cells in (counts.double(), expected.double())
    )
    assert expected[-1] > 0 or counts[-1] == 0, "drew what cannot be drawn"
    used = expected > 0
    statistic = ((counts - expected)[used] ** 2 / expected[used]).sum().item()
    freedom = int(used.sum()) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


@torch.no_grad()
def joint(network: Network, prompt: list[int], count: int, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Return the probability of each continuation of `count` tokens, from full forward passes."""
    table = {(): 1.0}
    for _ in range(count):
        grown = {}
        for tokens, probability in table.items():
            logits = network.logits(network(torch.tensor([[*prompt, *tokens]])).hidden[0, -1])
            for token, share in enumerate(distribution(logits, sampling).tolist()):
                grown[*tokens, token] = probability * share
        table = grown
    return table


def draws(network: Network, sampling: Sampling, length: int, count: int) -> tuple[list[tuple[int, ...]], Counter]:
    """Return continuations of 4 tokens, and how often a first verification kept how many drafts."""
    work = [Request(tokens=[1, 2, 0, 3], max_new_tokens=4, key=(number,)) for number in range(count)]
    found = list(generate(network, work, sampling, batch_size=count, draft_tokens=length))
    return [tuple(one.tokens) for one in found], Counter(one.accepted[0] for one in found)


SAMPLINGS = [
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.6, top_k=3, seed=2),
    Sampling(temperature=1.5, top_p=0.8, seed=3),
    Sampling(temperature=1.0, min_p=0.25, seed=4),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["plain", "top_k", "top_p", "min_p"])
@pytest.mark.parametrize(("length", "drafted"), [(1, 4), (3, 4), (2, 3)])
def test_sampled_tokens_are_distributed_jointly_as_plain_ones(
    sampling: Sampling, length: int, drafted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculative, "DRAFTED_LEAST", drafted)
    network, count = make("M*", "*", vocab_size=4), 3000
    table = joint(network, [1, 2, 0, 3], 4, sampling)
    found, kept = draws(network, sampling, length, count)
    assert min(kept[number] for number in range(length + 1)) > 20, kept
    observed = Counter(found)
    counts = torch.tensor([observed[tokens] for tokens in table])
    assert surprise(counts, count * torch.tensor([*table.values()])) < 4


def _forget_the_proposal(verdict: Verdict, targets: Tensor) -> Verdict:
    """Draw the token after a rejected draft from p, not from what is left of it: the mistake of many."""
    row = torch.arange(len(targets))
    own = torch.multinomial(targets[row, verdict.accepted], 1)
    return Verdict(verdict.tokens.scatter(1, verdict.accepted.unsqueeze(1), own), verdict.accepted)


def test_the_test_of_the_distribution_sees_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    right = speculative.verify_by_rejection
    monkeypatch.setattr(
        speculative,
        "verify_by_rejection",
        lambda drafts, proposals, targets, uniforms: _forget_the_proposal(
            right(drafts, proposals, targets, uniforms), targets
        ),
    )
    network, count = make("M*", "*", vocab_size=4), 3000
    table = joint(network, [1, 2, 0, 3], 4, SAMPLINGS[0])
    observed = Counter(draws(network, SAMPLINGS[0], 3, count)[0])
    counts = torch.tensor([observed[tokens] for tokens in table])
    assert surprise(counts, count * torch.tensor([*table.values()])) > 6


def test_rejection_draws_from_the_target_at_each_position() -> None:
    """k = 2 over 5 tokens, of which 4 can be drafted; one draft impossible for the target, one for the proposal."""
    rows, source = 40_000, random.Random(0)
    proposals = torch.tensor([[0.5, 0.2, 0.3, 0.0], [0.1, 0.1, 0.4, 0.4]])
    targets = torch.tensor([[0.1, 0.3, 0.0, 0.2, 0.4], [0.3, 0.1, 0.4, 0.1, 0.1], [0.0, 0.0, 0.5, 0.25, 0.25]])
    drafts = torch.stack([torch.multinomial(proposal, rows, replacement=True) for proposal in proposals], 1)
    uniforms = [[source.random() for _ in range(3)] for _ in range(rows)]
    tokens, accepted = verify_by_rejection(
        drafts, proposals.expand(rows, -1, -1), targets.expand(rows, -1, -1), uniforms
    )
    reached = torch.ones(rows, dtype=torch.bool)
    for place in range(3):
        counts = torch.bincount(tokens[reached, place], minlength=5)
        assert surprise(counts, targets[place] * reached.sum()) < 4
        reached &= accepted > place
    # A draft is kept with the probability that both distributions share.
    shared = torch.minimum(targets[:2, :4], proposals).sum(1)
    assert (accepted > 0).float().mean() == pytest.approx(float(shared[0]), abs=0.01)
    assert (accepted > 1).float().mean() == pytest.approx(float(shared.prod()), abs=0.01)


def test_equal_distributions_keep_every_draft() -> None:
    table = torch.tensor([0.1, 0.2, 0.7]).expand(500, 2, -1)
    drafts = torch.multinomial(table.flatten(0, 1), 1).view(500, 2)
    source = random.Random(0)
    uniforms = [[source.random() for _ in range(3)] for _ in range(500)]
    assert verify_by_rejection(drafts, table, table[:, :1].expand(-1, 3, -1), uniforms).accepted.tolist() == [2] * 500


# ------------------------------------------------------------------------------------------------------------- other


def test_several_processes_agree_on_drafts_and_outcome() -> None:
    network, shapes = make(), []

    def agree(chosen: Tensor) -> None:
        assert chosen.is_contiguous()
        assert chosen.dtype == torch.int64
        shapes.append(tuple(chosen.shape))

    list(generate(network, ask([[1, 2]], 4), GREEDY, draft_tokens=2, agree=agree))
    assert shapes[:3] == [(1,), (1, 3), (1, 4)]


def test_a_network_without_mtp_block_is_refused() -> None:
    network = make_network(tiny_config(num_nextn_predict_layers=0)).eval()
    with pytest.raises(UserError, match="draft_tokens: this model has no MTP block"):
        list(generate(network, ask([[1, 2]], 4), GREEDY, draft_tokens=2))


def test_half_precision_states() -> None:
    network = make("MM", "ME")
    found = list(generate(network, ask(prompts(3, seed=5), 12), GREEDY, draft_tokens=3, state_dtype=torch.float16))
    assert [len(completion.tokens) for completion in found] == [12, 12, 12]


# ------------------------------------------------------------------------------------------------------------ C code


needs_compiler = pytest.mark.skipif(native.load()[0] is None, reason="no C compiler")


@needs_compiler
@pytest.mark.parametrize(("pattern", "mtp", "seed"), NETWORKS)
@pytest.mark.parametrize("recipe", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.9, seed=5)], ids=["greedy", "sampled"])
def test_rounds_in_c_are_those_in_python(
    pattern: str, mtp: str, seed: int, recipe, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(vocab_size=VOCABULARY, hybrid_override_pattern=pattern, mtp_hybrid_override_pattern=mtp)
    network = make_network(config, recipe, seed).eval()
    if recipe is BF16:
        for module in network.modules():
            if isinstance(module, FormattedModule):
                module.weight = torch.nn.Parameter(module.weight.bfloat16(), requires_grad=False)
    monkeypatch.setattr(speculative, "DRAFTED_LEAST", 2)
    work, counts = ask(prompts(4, seed=len(pattern)), 14), Counter()
    verify = NativeRounds.verify

    def count(self: NativeRounds, uniforms: list[float]) -> int:
        counts["rounds"] += 1
        return verify(self, uniforms)

    monkeypatch.setattr(NativeRounds, "verify", count)
    for length in (1, 4):
        fast = list(generate(network, work, sampling, batch_size=1, draft_tokens=length))
        assert counts["rounds"] == sum(len(one.accepted) for one in fast)
        counts.clear()
        with monkeypatch.context() as patch:
            patch.setattr(NativeRounds, "fits", lambda *arguments: False)
            slow = list(generate(network, work, sampling, batch_size=1, draft_tokens=length))
        assert not counts
        assert [(one.tokens, one.accepted) for one in fast] == [(one.tokens, one.accepted) for one in slow]


@needs_compiler
def test_rounds_in_c_hand_over_to_rounds_in_python() -> None:
    """A decoder of one row that is made several."""
    network, prompt = make(), [1, 2, 0]
    decoder = SpeculativeDecoder(network, 1, 60, Decoding(sampling=GREEDY, draft_tokens=3))
    rows = [Row(limit=20, eos_ids=frozenset(), random=random.Random(0)) for _ in range(2)]
    with torch.no_grad():
        decoder.prefill([prompt])
        for _ in range(4):
            rows[0].extend(decoder.step(rows[:1]).tokens[0], [])
        rows[1].tokens = list(rows[0].tokens)
        decoder.select([0, 0])
        while rows[0].finish is None:
            for row, tokens in zip(rows, decoder.step(rows).tokens, strict=True):
                row.extend(tokens, [])
    assert rows[0].tokens == rows[1].tokens == greedy(network, prompt, 20)
