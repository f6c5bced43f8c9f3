"""Rows that join and leave a running batch against each of them decoded alone."""

import dataclasses
import random

import pytest
import torch

from modules.generation.continuous import BatchRow, ContinuousBatch, Prefill
from modules.generation.runner import Runner
from modules.generation.sampling import Sampling, distribution, draw
from tests.modules.helpers import make_network, tiny_config

SAMPLINGS = [Sampling(), Sampling(temperature=1.3, seed=7), Sampling(temperature=0.8, top_k=9, top_p=0.9, seed=1)]


@pytest.fixture(scope="module")
def network():
    return make_network(tiny_config()).eval()


@pytest.fixture(params=["C", "torch"])
def portable(request, monkeypatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr("modules.generation.runner.NativeLayers.describe", lambda *_: None)


def prompts(count: int, vocab_size: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(vocab_size) for _ in range(draw.randint(1, 30))] for _ in range(count)]


def new_row(limit: int, sampling: Sampling, key: tuple[int, ...], scored: int | None = 3) -> BatchRow:
    return BatchRow(limit=limit, eos_ids=frozenset(), random=sampling.stream(key), sampling=sampling, scored=scored)


@torch.no_grad()
def alone(network, prompt: list[int], limit: int, sampling: Sampling, key: tuple[int, ...]):
    """Tokens, and the log-probabilities of all tokens in their places, everything computed anew for each token."""
    tokens, tables, stream = list(prompt), [], sampling.stream(key)
    for _ in range(limit):
        logits = network.logits(network(torch.tensor([tokens])).hidden[:, -1])
        tables.append(logits.log_softmax(-1)[0])
        if sampling.greedy:
            tokens.append(int(logits.argmax()))
        else:
            tokens.append(int(draw(distribution(logits, sampling), [stream.random()])))
    return tokens[len(prompt) :], tables


@pytest.mark.usefixtures("portable")
@torch.no_grad()
def test_rows_that_join_and_leave_are_those_of_each_alone(network) -> None:
    chance, batch = random.Random(1), ContinuousBatch(network)
    waiting = []
    for number, prompt in enumerate(prompts(12, network.config.vocab_size)):
        limit, sampling = chance.randint(1, 14), SAMPLINGS[number % 3]
        waiting.append((prompt, [new_row(limit, sampling, (number, sample)) for sample in range(1 + number % 2)]))
    started, sizes = [], set()
    while waiting or batch.rows:
        if waiting and chance.random() < 0.5:
            prompt, rows = waiting.pop(0)
            prefill = Prefill(network, prompt, rows[0].limit)
            while not prefill.advance(7):
                pass
            batch.join(prefill, rows)
            started.append((prompt, rows))
        if batch.rows:
            batch.step()
            batch.leave()
            sizes.add(len(batch.rows))
    assert max(sizes) > 4, "rows were decoded together"
    assert len(started) == 12
    for number, (prompt, rows) in enumerate(started):
        for sample, row in enumerate(rows):
            tokens, tables = alone(network, prompt, row.limit, row.sampling, (number, sample))
            assert row.tokens == tokens
            assert row.finish == "length"
            for token, table, score in zip(tokens, tables, row.scores, strict=True):
                assert score.logprob == pytest.approx(float(table[token]), abs=1e-4)
                values, ids = table.topk(3)
                assert [place for place, _ in score.likeliest] == ids.tolist()
                assert [value for _, value in score.likeliest] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.usefixtures("portable")
@torch.no_grad()
def test_a_prompt_is_scored_whatever_the_pieces(network) -> None:
    prompt = prompts(1, network.config.vocab_size)[0] * 3
    whole = network.logits(network(torch.tensor([prompt])).hidden[0]).log_softmax(-1)
    for count in (1, 7, len(prompt)):
        prefill = Prefill(network, prompt, 0, scored=2)
        while not prefill.advance(count):
            pass
        assert len(prefill.scores) == len(prompt) - 1
        for place, score in enumerate(prefill.scores):
            assert score.logprob == pytest.approx(float(whole[place, prompt[place + 1]]), abs=1e-4)
            assert [token for token, _ in score.likeliest] == whole[place].topk(2).indices.tolist()


@torch.no_grad()
def test_prefill_and_first_token_do_not_depend_on_the_rows_beside(network) -> None:
    """Bit for bit: a prompt goes through by itself."""

    def first(beside: int) -> BatchRow:
        batch = ContinuousBatch(network)
        for number in range(beside):
            prefill = Prefill(network, [number + 1, 2], 9)
            prefill.advance(9)
            batch.join(prefill, [new_row(9, SAMPLINGS[1], (number,))])
            batch.step()
        prefill, row = Prefill(network, [4, 5, 6], 9), new_row(9, SAMPLINGS[2], (99,))
        prefill.advance(9)
        batch.join(prefill, [row])
        return row

    assert first(0).scores == first(5).scores
    assert first(0).tokens == first(5).tokens


@torch.no_grad()
def test_rows_that_left_are_forgotten(network) -> None:
    batch, kept = ContinuousBatch(network), new_row(4, SAMPLINGS[0], ())
    for row in (kept, new_row(500, SAMPLINGS[0], ())):
        prefill = Prefill(network, [1, 2, 3], row.limit)
        prefill.advance(3)
        batch.join(prefill, [row])
    batch.rows[1].finish = "stop"  # whoever asked has gone
    batch.leave()
    assert batch.rows == [kept]
    assert batch._runner.cache.lengths == [3]
    kept.finish = "stop"
    batch.leave()
    assert batch._runner.cache.size() == (0, 0)
    prefill = Prefill(network, [1, 2, 3], 2)
    prefill.advance(3)
    batch.join(prefill, [new_row(2, SAMPLINGS[0], ())])
    assert batch._runner.cache.capacity == 5, "the room of those that left is given back"


@torch.no_grad()
def test_rows_of_a_token_never_join(network) -> None:
    batch, prefill = ContinuousBatch(network), Prefill(network, [1, 2, 3], 1)
    prefill.advance(3)
    rows = [new_row(1, SAMPLINGS[1], (sample,)) for sample in range(3)]
    batch.join(prefill, rows)
    assert [row.finish for row in rows] == ["length"] * 3
    assert batch.rows == []


@torch.no_grad()
def test_a_row_that_fails_to_fit_alone_fits_once_it_joins(network) -> None:
    """The cache takes the larger capacity of those that meet, in either order."""
    for limits in ((3, 40), (40, 3)):
        batch, rows = ContinuousBatch(network), [new_row(limit, SAMPLINGS[0], ()) for limit in limits]
        for row in rows:
            prefill = Prefill(network, [5, 6], row.limit)
            prefill.advance(2)
            batch.join(prefill, [row])
        while batch.rows:
            batch.step()
            batch.leave()
        assert [len(row.tokens) for row in rows] == list(limits)
        assert rows[0].tokens[:3] == rows[1].tokens[:3]


def test_a_seed_says_what_is_drawn_not_how(network) -> None:
    """Rows that differ in nothing but the seed share the work of a distribution."""
    calls = []

    def counted(logits, sampling):
        calls.append(len(logits))
        return distribution(logits, sampling)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("modules.generation.continuous.distribution", counted)
        batch, prefill = ContinuousBatch(network), Prefill(network, [1], 3)
        prefill.advance(1)
        rows = [new_row(3, dataclasses.replace(SAMPLINGS[1], seed=seed), ()) for seed in range(4)]
        batch.join(prefill, rows)
    assert calls == [4]
    assert len({tuple(row.tokens) for row in rows}) > 1


def test_the_pass_of_the_c_code_is_used(network) -> None:
    runner = Runner(network, 0, 0)
    assert runner.native is not None
