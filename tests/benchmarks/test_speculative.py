"""Figures of the speculative part against counts by hand, and its table for a small network."""

from pathlib import Path

import pytest

from benchmarks import speculative
from benchmarks.speculative import DRAFTS, Turn, loop_start
from tests.modules.helpers import make_network, tiny_config

PROMPTS = [[5, 9, 2, 41, 7], [1, 2, 3, 4, 60]]


class Local:
    """A side without a process."""

    ready = True

    def __init__(self, *_) -> None:
        self.network = make_network(tiny_config(), seed=1).eval().requires_grad_(False)

    def ask(self, turn: Turn):
        return (speculative.costs if turn.costs else speculative.write)(self.network, PROMPTS, turn)

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("tokens", "start"),
    [
        (list(range(40)), None),
        ([9, 8, *[1, 2, 3] * 8], 5),
        ([*[1, 2, 3] * 4, *range(10, 50)], None),  # 12 tokens: too few
        ([*[4] * 20, *range(10, 50)], 1),
        ([*range(100, 140), *range(100, 140), *range(100, 140)], None),  # too long a cycle
        (list(range(20)) * 3, 20),
        (list(range(20)) * 2, None),  # a repetition, but no cycle
    ],
)
def test_a_loop_starts_with_its_second_turn(tokens: list[int], start: int | None):
    assert loop_start(tokens) == start


def test_drafts_change_no_greedy_token():
    side = Local()
    plain = side.ask(Turn(0, 20, 0, 0.0, 0))
    drafted = side.ask(Turn(0, 20, 3, 0.0, 0))
    assert plain.tokens == drafted.tokens
    assert plain.accepted == []
    assert sum(kept + 1 for kept in drafted.accepted) < 20
    assert min(*plain.prompt, *plain.whole) > 0


def test_costs_are_those_of_a_round():
    side = Local()
    assert side.ask(Turn(0, 8, 0, 0.0, 0, costs=True)).drafts == 0
    assert min(side.ask(Turn(0, 8, 2, 1.0, 0, costs=True))) > 0


def test_the_table(monkeypatch, capsys):
    monkeypatch.setattr(speculative, "Side", Local)
    monkeypatch.setattr(speculative, "LEAST", 1)
    speculative.compare(Path("a_model"), PROMPTS, 20, threads=1, rounds=2)
    printed = capsys.readouterr().out
    assert printed.count("speculative decoding, a_model") == 2
    assert printed.count("chosen draft length: ") == 2
    rows = [line.split() for line in printed.splitlines() if line.split()[:1] and line.split()[0] in map(str, DRAFTS)]
    assert sum(row[-1] == "100.0%" for row in rows if len(row) == 10) == len(DRAFTS) - 1
