"""Log-probabilities, greedy flags and KL of unequal rows equal transformers' and those of each row alone."""

import pytest
import torch

from modules.backbone import model
from modules.errors import UserError
from modules.generation.scoring import batches, score
from tests.modules.backbone.test_parity import load_ours_into_theirs, their_model
from tests.modules.helpers import BF16, make_network, tiny_config

TOLERANCE = 1e-4


def random_rows(*lengths: int, vocab_size: int = 64) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


ROWS = random_rows(5, 33, 1, 17, 0, 40, 2, 17)


@pytest.fixture(scope="module")
def network():
    return make_network(tiny_config()).eval()


@pytest.fixture(scope="module")
def reference():
    return make_network(tiny_config(hybrid_override_pattern="M*"), seed=5).eval()


def in_order(network, rows, **options):
    scores = dict(score(network, rows, **options))
    assert sorted(scores) == list(range(len(rows)))
    return [scores[index] for index in range(len(rows))]


@torch.no_grad()
def full_logprobs(network, row: list[int]) -> torch.Tensor:
    """[n - 1, V] of one row alone, in float64 after the head."""
    return network.logits(network(torch.tensor([row])).hidden)[0, :-1].double().log_softmax(-1)


@pytest.mark.parametrize("batch_tokens", [48, 130, 8192])
def test_unequal_rows_together_equal_transformers(network, batch_tokens: int) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    config = tiny_config(num_nextn_predict_layers=0)
    ours = make_network(config).eval()
    theirs = their_model(transformers, config)
    load_ours_into_theirs(ours, theirs)
    for row, scores in zip(ROWS, in_order(ours, ROWS, batch_tokens=batch_tokens), strict=True):
        assert scores.logprobs.shape == scores.greedy.shape == (max(len(row) - 1, 0),)
        if len(row) > 1:
            with torch.no_grad():
                expected = theirs(torch.tensor([row]), use_cache=False).logits[0, :-1].log_softmax(-1)
            targets = torch.tensor(row[1:])
            assert (scores.logprobs - expected[torch.arange(len(targets)), targets]).abs().max() < TOLERANCE
            assert torch.equal(scores.greedy, expected.argmax(-1) == targets)


def test_greedy_says_where_the_token_is_the_most_likely_one(network) -> None:
    row = list(ROWS[0])
    for _ in range(6):
        row.append(int(full_logprobs(network, [*row, 0])[-1].argmax()))
    greedy = in_order(network, [row])[0].greedy
    assert greedy[-6:].all()
    assert not greedy[: len(ROWS[0]) - 1].all()


@pytest.mark.parametrize("elements", [64, 1 << 24])
def test_kl_is_that_of_the_full_distributions_and_has_a_direction(network, reference, monkeypatch, elements) -> None:
    monkeypatch.setitem(model.LOGITS_AT_ONCE, "cpu", elements)
    for row, scores in zip(ROWS, in_order(network, ROWS, reference=reference, batch_tokens=64), strict=True):
        assert scores.kl is not None
        assert scores.kl.shape == scores.logprobs.shape
        if len(row) > 1:
            ours, theirs = full_logprobs(network, row), full_logprobs(reference, row)
            torch.testing.assert_close(
                scores.kl.double(), (theirs.exp() * (theirs - ours)).sum(-1), atol=1e-5, rtol=1e-4
            )
            assert not torch.allclose(scores.kl.double(), (ours.exp() * (ours - theirs)).sum(-1), rtol=1e-3)


def test_the_reference_is_scored_beside_it(network, reference) -> None:
    for row, scores in zip(ROWS, in_order(network, ROWS, reference=reference, batch_tokens=64), strict=True):
        assert scores.reference_logprobs is not None
        assert scores.agreement is not None
        assert scores.agreement.shape == scores.reference_logprobs.shape == scores.logprobs.shape
        if len(row) > 1:
            ours, theirs = full_logprobs(network, row), full_logprobs(reference, row)
            expected = theirs[torch.arange(len(row) - 1), row[1:]]
            torch.testing.assert_close(scores.reference_logprobs.double(), expected, atol=1e-5, rtol=1e-4)
            assert torch.equal(scores.agreement, ours.argmax(-1) == theirs.argmax(-1))


def test_a_network_does_not_diverge_from_itself(network) -> None:
    assert all(scores.kl.eq(0).all() for scores in in_order(network, ROWS, reference=network))


@pytest.mark.parametrize("batch_tokens", [8, 13, 39, 40])
def test_a_long_row_goes_through_in_pieces(network, reference, batch_tokens: int) -> None:
    whole = in_order(network, ROWS, reference=reference)
    pieces = in_order(network, ROWS, reference=reference, batch_tokens=batch_tokens)
    for expected, actual in zip(whole, pieces, strict=True):
        torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


def test_bf16_is_scored_in_fp32(network) -> None:
    scores = in_order(make_network(tiny_config(), BF16).eval(), ROWS)
    assert all(row.logprobs.dtype == torch.float32 for row in scores)
    exact = in_order(network, ROWS)
    assert (scores[5].logprobs - exact[5].logprobs).abs().max() < 0.5


def test_weights_that_are_not_finite_are_named() -> None:
    network = make_network(tiny_config()).eval()
    with torch.no_grad():
        network.lm_head.weight[3] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        list(score(network, ROWS))


def test_batches_hold_every_row_once_and_little_padding() -> None:
    lengths = [3, 900, 0, 7, 5, 100, 3, 101, 99]
    found = list(batches(lengths, 300))
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    assert found[0] == [1]
    assert all(len(batch) * lengths[batch[0]] <= 300 for batch in found[1:])
    assert [lengths[index] for batch in found for index in batch] == sorted(lengths, reverse=True)
    assert list(batches([], 8)) == []
    assert list(batches([0, 0], 8)) == [[0, 1]]
