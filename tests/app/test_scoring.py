"""Stretches of rows that are scored and written together, and figures that need no model."""

import math

import pytest

from app.commands.score import windows
from app.scoring import describe, summarise


@pytest.mark.parametrize("lengths", [[5], [3, 4, 100, 0, 0, 2, 50, 1], [0] * 7, [7] * 20])
@pytest.mark.parametrize("tokens", [1, 8, 1000])
def test_windows_hold_every_row_once_in_order(lengths: list[int], tokens: int) -> None:
    found = windows(lengths, tokens)
    assert [index for window in found for index in window] == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in window[:-1]) < tokens for window in found)
    assert all(len(window) <= tokens for window in found), "empty rows do not pile up"


def test_figures_of_scored_rows() -> None:
    rows = [
        {"token_ids": [0, 1, 2], "logprobs": [-1.0, -3.0]},
        {"token_ids": [0, 1, 2, 3], "logprobs": [-9.0, -2.0, -4.0], "completion_start": 2},
        {"token_ids": [1, 2], "logprobs": [-5.0], "completion_start": 0},
        {"token_ids": [], "logprobs": []},
    ]
    summary = summarise(rows, [7, 2, 3, 0])
    assert summary == pytest.approx(
        {
            "rows": 4,
            "tokens": 5,
            "nll": 3.0,
            "perplexity": math.exp(3),
            "bits_per_byte": 15 / math.log(2) / (2 + 3 + 3 + 0 + 3),
            "kl": None,
        }
    )


def test_nothing_scored_has_no_perplexity() -> None:
    summary = summarise([{"token_ids": [3], "logprobs": [], "kl": []}], None)
    assert (summary["tokens"], summary["nll"], summary["perplexity"], summary["kl"]) == (0, None, None, None)
    assert describe(summary) == "1 rows, 0 tokens scored"
