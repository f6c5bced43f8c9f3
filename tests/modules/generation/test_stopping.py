"""Texts of token streams against one search in the whole text."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models

from datamodules.tokenizer import Tokenizer as OurTokenizer
from modules.generation.stopping import TextStream

TEXT = "naïve 日本 😀 def stop(): return 'END'\n\n" * 3


@pytest.fixture(scope="module")
def tokenizer() -> OurTokenizer:
    return OurTokenizer.train([TEXT, "the end of the line\n" * 5], 300)


def feed(stream: TextStream, tokens: list[int], sizes: list[int] | None = None) -> tuple[list[str], int]:
    """Return the pieces that were certain after each step, and how many tokens were taken."""
    pieces, place = [], 0
    for size in sizes or [1] * len(tokens):
        stopped = stream.add(tokens[place : place + size])
        place += size
        pieces.append(stream.take())
        if stopped:
            break
    return [*pieces, stream.finish()], place


@pytest.mark.parametrize("seed", range(4))
def test_pieces_are_the_text(tokenizer, seed: int) -> None:
    generator = random.Random(seed)
    tokens = tokenizer.encode(TEXT)
    sizes = []
    while sum(sizes) < len(tokens):
        sizes.append(generator.randint(1, 3))
    pieces, _ = feed(TextStream(tokenizer.decode, []), tokens, sizes)
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    "stop", [["END"], ["本 😀"], ["\n\n"], ["'", "ND"], ["p():", "stop("], ["never"], ["e 日", "x"]]
)
def test_a_stop_string_cuts_the_text_before_it(tokenizer, stop: list[str]) -> None:
    tokens = tokenizer.encode(TEXT)
    stream = TextStream(tokenizer.decode, [], stop)
    pieces, taken = feed(stream, tokens)
    places = [TEXT.find(word) for word in stop if word in TEXT]
    expected = TEXT[: min(places)] if places else TEXT
    assert stream.text == "".join(pieces) == expected
    assert stream.stopped == bool(places)
    if places:  # it stopped at the first token with which the stop string was complete
        assert not any(word in tokenizer.decode(tokens[: taken - 1]) for word in stop)


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    stream = TextStream(lambda ids: "".join(map(chr, ids)), [], ["abab!"])
    pieces = []
    for character in "xababab":
        stream.add([ord(character)])
        pieces.append(stream.take())
    assert pieces == ["x", "", "", "", "", "ab", ""]
    stream.add([ord("c")])
    assert stream.take() == "ababc"
    assert stream.finish() == ""


def test_broken_bytes_come_out_at_the_end(tokenizer) -> None:
    tokens = tokenizer.encode("日")[:-1]
    stream = TextStream(tokenizer.decode, [])
    for token in tokens:
        stream.add([token])
    assert stream.take() == ""
    assert stream.finish() == tokenizer.decode(tokens) != ""


@pytest.mark.parametrize("seed", range(6))
def test_any_tokens_give_the_text_of_the_decoder(tokenizer, seed: int) -> None:
    generator = random.Random(seed)
    tokens = [generator.randrange(tokenizer.vocab_size) for _ in range(80)]
    pieces, _ = feed(TextStream(tokenizer.decode, []), tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)


def test_a_blank_that_a_decoder_drops_at_the_beginning_is_kept() -> None:
    inner = Tokenizer(models.WordLevel({"\u2581a": 0, "\u2581b": 1, "c": 2}, unk_token="c"))
    inner.decoder = decoders.Metaspace()
    pieces, _ = feed(TextStream(inner.decode, [0, 1]), [0, 1, 2])
    assert inner.decode([0, 1]) == "a b", "it is dropped"
    assert "".join(pieces) == " a bc"
