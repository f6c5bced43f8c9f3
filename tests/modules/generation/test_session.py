"""A conversation in the cache against one that is computed anew each turn."""

import pytest

from modules.generation import session as sessions
from modules.generation.engine import Request, generate
from modules.generation.sampling import Sampling
from modules.generation.session import Session
from tests.modules.helpers import make_network, tiny_config

WARM = Sampling(temperature=1.2, top_k=30, seed=4)
EOS = (7, 11)


@pytest.fixture(scope="module")
def network():
    return make_network(tiny_config()).eval()


def decode(tokens: list[int]) -> str:
    return "".join(chr(40 + token) for token in tokens)


def anew(network, tokens: list[int], turn: int, count: int = 12) -> tuple[list[int], str]:
    request = Request(tokens=tokens, max_new_tokens=count, key=(turn,))
    (completion,) = generate(network, [request], WARM, eos_ids=EOS, decode=decode)
    assert completion.text is not None
    kept = completion.tokens[:-1] if completion.finish == "eos" else completion.tokens
    return tokens + kept, completion.text


def test_turns_equal_those_computed_anew_and_only_new_tokens_are_computed(network) -> None:
    session = Session(network, WARM, EOS, decode)
    tokens, open_end = list[int](), False
    for turn in range(6):
        tokens = [*tokens, 11, 20 + turn, 30, 31]
        text = "".join(session.reply(tokens, 12))
        assert (session.tokens, session.text) == anew(network, tokens, turn)
        assert session.text == text
        # new: what the user said, and the token that was written last if it did not end the reply
        assert session.computed == 4 + open_end
        open_end = len(session.tokens) == len(tokens) + 12
        tokens = session.tokens
    assert len(tokens) > 40


def test_a_changed_reply_goes_on_from_before_it(network) -> None:
    session = Session(network, WARM, EOS, decode)
    first = [3, 4, 5, 6]
    list(session.reply(first, 12))
    changed = [*first, 50, 51, 11, 20]
    list(session.reply(changed, 12))
    assert session.computed == 4
    assert (session.tokens, session.text) == anew(network, changed, 1)
    other = [9, 4, 5]
    list(session.reply(other, 12))
    assert session.computed == 3
    assert (session.tokens, session.text) == anew(network, other, 2)


def test_thoughts_that_are_dropped_cost_no_more_than_what_follows_them(network) -> None:
    """The prompt ends with a mark that the next turn has not; a tool's answer comes while the thoughts still stand."""
    session = Session(network, WARM, EOS, decode)
    first, mark = [3, 4, 5, 6, 8], [60, 61]
    list(session.reply([*first, *mark], 12, len(first)))
    assert (session.tokens, session.text) == anew(network, [*first, *mark], 0)
    tool = [*session.tokens, 11, 20, *mark]
    list(session.reply(tool, 12, len(first)))
    assert session.computed < len(tool) - len(first)
    assert (session.tokens, session.text) == anew(network, tool, 1)
    dropped = [*first, 62, 50, 51, 11, 21, 22, *mark]
    list(session.reply(dropped, 12, len(dropped) - 2))
    assert session.computed == len(dropped) - len(first)
    assert (session.tokens, session.text) == anew(network, dropped, 2)
    again = [*dropped[:-2], 62, 52, 11, 23, *mark]
    list(session.reply(again, 12, len(again) - 2))
    assert session.computed == 6
    assert (session.tokens, session.text) == anew(network, again, 3)


def test_a_reply_may_be_broken_off(network) -> None:
    session = Session(network, WARM, (), decode)
    pieces = session.reply([3, 4, 5, 6], 12)
    text = next(pieces) + next(pieces) + next(pieces)
    pieces.close()
    assert session.text == text == decode(session.tokens[4:])
    tokens = [*session.tokens, 11, 20]
    list(session.reply(tokens, 12))
    assert session.computed == 3
    request = Request(tokens=tokens, max_new_tokens=12, key=(1,))
    assert session.tokens == tokens + next(iter(generate(network, [request], WARM))).tokens


def test_a_long_conversation_gets_a_larger_cache(network, monkeypatch) -> None:
    monkeypatch.setattr(sessions, "LEAST_CAPACITY", 8)
    session = Session(network, WARM, (), decode)
    tokens = [3]
    for turn in range(4):
        list(session.reply(tokens, 10))
        request = Request(tokens=tokens, max_new_tokens=10, key=(turn,))
        assert session.tokens == tokens + next(iter(generate(network, [request], WARM))).tokens
        tokens = [*session.tokens, 5]
    assert session.computed < 44
