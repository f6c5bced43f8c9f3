import random
import re
from types import SimpleNamespace

import pytest

from app.inspection.tokens import Token, Vocabulary
from datamodules.tokenizer import Tokenizer
from tests.app.inspection.helpers import CHAT_START, EOS, byte_tokenizer, ids


@pytest.fixture
def vocabulary() -> Vocabulary:
    return Vocabulary(byte_tokenizer())


def test_plain_text_is_shown_as_it_is(vocabulary: Vocabulary):
    assert [token.text for token in vocabulary.show(ids("a <b>"))] == ["a", " ", "<", "b", ">"]


def test_special_and_unknown_tokens_are_told_from_text(vocabulary: Vocabulary):
    assert vocabulary.show([EOS, CHAT_START, 288, -1, 10**9]) == [
        Token("</s>", "special"),
        Token("<|im_start|>", "special"),
        Token("⟨id 288⟩", "unknown"),
        Token("⟨id -1⟩", "unknown"),
        Token("⟨id 1000000000⟩", "unknown"),
    ]
    assert {token.kind for token in vocabulary.show(ids("</s>"))} == {"text"}
    assert (vocabulary.eos_id, vocabulary.pad_id, vocabulary.chat_start_id) == (2, 0, 10)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("é", ["⟨C3⟩", "⟨A9⟩é"]),
        ("日本", ["⟨E6⟩", "⟨97⟩", "⟨A5⟩日", "⟨E6⟩", "⟨9C⟩", "⟨AC⟩本"]),
        ("😀", ["⟨F0⟩", "⟨9F⟩", "⟨98⟩", "⟨80⟩😀"]),
        ("a\n\tb\r", ["a", "↵\n", "⇥\t", "b", "␍"]),
        ("\x00\x1b\x7f", ["␀", "␛", "␡"]),
        ("\u202e", ["⟨E2⟩", "⟨80⟩", "⟨AE⟩⟨U+202E⟩"]),
        ("\u00a0", ["⟨C2⟩", "⟨A0⟩⟨U+00A0⟩"]),
    ],
)
def test_bytes_and_hidden_characters(vocabulary: Vocabulary, text: str, shown: list[str]):
    assert [token.text for token in vocabulary.show(ids(text))] == shown


def test_bytes_that_are_no_character_stay_bytes(vocabulary: Vocabulary):
    first, second, third = ids("日")
    byte = {number: index for index, number in zip(ids("ÿ"), "ÿ".encode(), strict=True)}
    assert [token.text for token in vocabulary.show([first, *ids("x"), third])] == ["⟨E6⟩", "x", "⟨A5⟩"]
    assert [token.text for token in vocabulary.show([first, second, EOS, third])] == ["⟨E6⟩", "⟨97⟩", "</s>", "⟨A5⟩"]
    assert [token.text for token in vocabulary.show([second, *byte.values()])] == ["⟨97⟩", "⟨C3⟩", "⟨BF⟩ÿ"]


def test_tokens_of_several_characters_and_parts():
    pieces = "aé日".encode()[:5], "日".encode()[2:] + "y😀".encode()[:3], "😀".encode()[2:] + b"z", "ab é".encode()
    contents = SimpleNamespace(contents=lambda: list(pieces), special_ids=frozenset(), eos_id=0, pad_id=0)
    shown = Vocabulary(contents).show([0, 1, 2, 3, 2])  # type: ignore[arg-type]
    assert [(token.text, token.kind) for token in shown] == [
        ("aé⟨E6 97⟩", "bytes"),
        ("⟨A5⟩日y⟨F0 9F⟩", "bytes"),
        ("⟨98 80⟩😀z", "bytes"),
        ("ab é", "text"),
        ("⟨98 80⟩z", "bytes"),
    ]


def test_a_trained_vocabulary_loses_nothing():
    texts = ["日本語 naïve 😀 x日本y" * 3, "日本語日本 é😀é 本語"]
    tokenizer = Tokenizer.train(texts * 20, 300)
    for text in texts:
        shown = Vocabulary(tokenizer).show(tokenizer.encode(text))
        assert {token.kind for token in shown} == {"text", "bytes"}
        assert re.sub(r"⟨[0-9A-F ]+⟩", "", "".join(token.text for token in shown)) == text


def test_no_byte_is_lost_in_random_sequences(vocabulary: Vocabulary):
    generator = random.Random(0)
    byte_of = {index: content[0] for index, content in enumerate(byte_tokenizer().contents()) if index >= 32}
    for _ in range(50):
        sequence = [generator.choice(list(byte_of)) for _ in range(40)]
        data = bytes(byte_of[index] for index in sequence)
        shown = vocabulary.show(sequence)
        assert len(shown) == 40
        for index, token in zip(sequence, shown, strict=True):
            assert (token.kind == "text") == (byte_of[index] < 0x80)
            if token.kind == "bytes":
                assert token.text.startswith(f"⟨{byte_of[index]:02X}⟩")
        characters = [c for c in data.decode(errors="ignore") if ord(c) > 0x7F]
        found = [token.text[4:] for token in shown if token.kind == "bytes" and len(token.text) > 4]
        assert found == [c if c.isprintable() else f"⟨U+{ord(c):04X}⟩" for c in characters]


def test_a_long_text_of_cut_characters_takes_linear_time(vocabulary: Vocabulary):
    shown = vocabulary.show(ids("日本" * 5000))
    assert sum(token.text.endswith(("日", "本")) for token in shown) == 10_000
