"""The engine against a plain loop over one prompt that computes everything anew for each token."""

import random

import pytest
import torch

from modules.errors import UserError
from modules.generation import native
from modules.generation.engine import Request, generate, plan_batches
from modules.generation.runner import Runner
from modules.generation.sampling import Sampling, distribution, draw
from tests.modules.helpers import make_network, tiny_config

GREEDY = Sampling()
WARM = Sampling(temperature=1.3, top_k=30, top_p=0.95, seed=7)
PROMPTS = [[3, 14, 15], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2], [9], [1, 2, 3, 4, 5, 6]]


@pytest.fixture(scope="module")
def network():
    return make_network(tiny_config()).eval()


@torch.no_grad()
def loop(network, prompt: list[int], count: int, sampling: Sampling, key: tuple[int, ...] = ()):
    """Return tokens and log-probabilities."""
    tokens, logprobs, stream = list(prompt), [], sampling.stream(key)
    for _ in range(count):
        logits = network.logits(network(torch.tensor([tokens])).hidden[:, -1])
        if sampling.greedy:
            chosen = int(logits.argmax())
        else:
            chosen = int(draw(distribution(logits, sampling), [stream.random()]))
        tokens.append(chosen)
        logprobs.append(float(logits.log_softmax(-1)[0, chosen]))
    return tokens[len(prompt) :], logprobs


def requests(count: int = 9, prompts=PROMPTS) -> list[Request]:
    return [Request(tokens=prompt, max_new_tokens=count, key=(number, 0)) for number, prompt in enumerate(prompts)]


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("prefill_tokens", [1, 12, 4096])
def test_tokens_equal_those_of_a_loop(network, sampling, batch_size: int, prefill_tokens: int) -> None:
    found = list(
        generate(network, requests(), sampling, batch_size=batch_size, prefill_tokens=prefill_tokens, logprobs=True)
    )
    for number, (prompt, completion) in enumerate(zip(PROMPTS, found, strict=True)):
        tokens, logprobs = loop(network, prompt, 9, sampling, (number, 0))
        assert completion.tokens == tokens
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-5)
        assert completion.finish == "length"
    assert len({tuple(completion.tokens) for completion in found}) > 3


def test_samples_of_a_prompt_share_its_prefill(network, monkeypatch) -> None:
    work = [Request(tokens=PROMPTS[2], max_new_tokens=6, key=(0, sample)) for sample in range(4)]
    passes: list[torch.Size] = []
    run = Runner.run

    def seen(self: Runner, tokens: torch.Tensor, **options: list[int]) -> torch.Tensor:
        passes.append(tokens.shape)
        return run(self, tokens, **options)

    monkeypatch.setattr(Runner, "run", seen)
    found = [completion.tokens for completion in generate(network, work, WARM)]
    assert found == [loop(network, PROMPTS[2], 6, WARM, (0, sample))[0] for sample in range(4)]
    assert len(set(map(tuple, found))) > 1
    assert passes == [torch.Size([1, 11])] + [torch.Size([4, 1])] * 5


def test_rows_end_at_their_eos_and_leave_the_batch(network) -> None:
    free = [loop(network, prompt, 12, WARM, (number, 0))[0] for number, prompt in enumerate(PROMPTS)]
    eos_ids = {free[0][2], free[2][7]}
    for completion, tokens in zip(generate(network, requests(12), WARM, eos_ids=tuple(eos_ids)), free, strict=True):
        ends = [place for place, token in enumerate(tokens) if token in eos_ids]
        assert completion.finish == ("eos" if ends else "length")
        assert completion.tokens == tokens[: ends[0] + 1 if ends else None]


def decode(tokens: list[int]) -> str:
    return "".join(chr(40 + token) for token in tokens)


def test_stop_strings_end_a_row_and_its_text(network) -> None:
    free = loop(network, PROMPTS[0], 12, WARM, (0, 0))[0]
    stop = decode(free)[4:7]
    (found,) = generate(network, requests(12, PROMPTS[:1]), WARM, decode=decode, stop=["never", stop], logprobs=True)
    place = decode(free).index(stop)
    assert found.finish == "stop"
    assert found.text == decode(free)[:place]
    assert found.tokens == free[: place + 3]
    assert len(found.logprobs) == place + 3


def test_texts_stream_by_request_and_leave_out_the_eos(network) -> None:
    free = loop(network, PROMPTS[2], 9, WARM, (2, 0))[0]
    eos, pieces = free[5], {number: "" for number in range(len(PROMPTS))}

    def add(number: int, piece: str) -> None:
        pieces[number] += piece

    found = list(generate(network, requests(), WARM, eos_ids=[eos], decode=decode, on_text=add))
    assert [completion.text for completion in found] == list(pieces.values())
    assert found[2].finish == "eos"
    for completion in found:
        assert completion.text == decode([token for token in completion.tokens if token != eos])


def test_limits_may_differ_and_be_nothing(network) -> None:
    work = [Request(tokens=[3, 1], max_new_tokens=count) for count in (0, 5, 1, 0)]
    tokens = loop(network, [3, 1], 5, GREEDY)[0]
    assert [found.tokens for found in generate(network, work, GREEDY)] == [[], tokens, tokens[:1], []]
    assert [found.tokens for found in generate(network, work[:1], GREEDY)] == [[]]


def test_a_late_first_request_gets_the_same(network) -> None:
    generator = random.Random(0)
    prompts = [[generator.randrange(64) for _ in range(generator.randint(1, 9))] for _ in range(13)]
    whole = list(generate(network, requests(3, prompts), WARM, batch_size=3))
    for first in (0, 1, 7, 12, 13):
        assert list(generate(network, requests(3, prompts), WARM, batch_size=3, first=first)) == whole[first:]


def test_batches_hold_every_request_once_and_similar_lengths() -> None:
    generator = random.Random(1)
    lengths = [generator.randint(1, 1000) for _ in range(203)]
    batches = plan_batches(lengths, 8, window=4)
    assert sorted(number for batch in batches for number in batch) == list(range(203))
    assert max(map(len, batches)) == 8
    positions = sum(max(lengths[number] for number in batch) * len(batch) for batch in batches)
    in_order = sum(max(lengths[start : start + 8]) * len(lengths[start : start + 8]) for start in range(0, 203, 8))
    assert sum(lengths) < positions < sum(lengths) + 0.3 * (in_order - sum(lengths))
    firsts = [min(batch) for batch in batches]
    assert firsts == sorted(firsts), "what comes first is not kept waiting"
    for place, batch in enumerate(batches):  # nothing waits longer than its window
        assert all(number < (place // 4 + 1) * 32 for number in batch)


def test_the_mode_stays_and_no_gradient_is_kept(network) -> None:
    network.train()
    list(generate(network, requests(2), GREEDY))
    assert network.training
    network.eval()
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("draft_tokens", [0, 2])
def test_training_with_activation_checkpointing_writes_the_tokens_of_evaluation(draft_tokens: int, monkeypatch) -> None:
    """A checkpointed layer goes on from the cache as any other does; the portable passes, for C code knows no mode."""
    monkeypatch.setattr(native, "load", lambda: (None, "switched off"))
    network, work = make_network(tiny_config()).eval(), requests()
    expected = [completion.tokens for completion in generate(network, work, GREEDY)]
    network.checkpoint_activations()
    network.train()
    found = generate(network, work, GREEDY, draft_tokens=draft_tokens)
    assert [completion.tokens for completion in found] == expected


def test_processes_can_agree_on_the_tokens(network) -> None:
    found = list(generate(network, requests(4), GREEDY, agree=lambda chosen: chosen.fill_(17)))
    assert all(completion.tokens == [17] * 4 for completion in found)


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ([], {}, "^prompt: must hold"),
        ([64], {}, "^prompt: holds a token id outside 0 to 63"),
        ([-1], {}, "^prompt: holds a token id outside 0 to 63"),
        ([1], {"batch_size": 0}, "^batch_size: 0"),
        ([1], {"stop": [""], "decode": decode}, "^stop: a stop string is empty"),
        ([1], {"stop": ["a"]}, "^stop: stop strings need the text"),
    ],
)
def test_mistakes_are_named(network, prompt: list[int], changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(generate(network, [Request(tokens=prompt, max_new_tokens=1)], GREEDY, **changes))
