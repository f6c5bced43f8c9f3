"""Each trouble planted in a sound batch is named once, with its row and position; the sound batch is left alone."""

import pytest

from app.inspection.checks import warnings
from modules.batch import PackedBatch
from tests.app.inspection.helpers import CHAT_END, CHAT_START, EOS, NONE, PAD, batch, ids, packed, view_of


def test_sound_batches_have_no_warnings():
    assert warnings(view_of(*packed())) == []
    assert warnings(view_of(conversation(masked=True))) == []


def conversation(masked: bool) -> PackedBatch:
    q, a = ids("qa")
    tokens = [CHAT_START, q, CHAT_END, CHAT_START, a, CHAT_END, EOS]
    labels = [*tokens[1:], NONE]
    if masked:
        labels[:3] = [NONE] * 3
    return batch([tokens], [labels], [[0] * 7])


@pytest.mark.parametrize(
    ("field", "position", "value", "expected"),
    [
        ("labels", 1, 70, ["label is not the next token of the same document: row 0 from position 1"]),
        ("labels", 2, ids("c")[0], ["label is not the next token of the same document: row 0 from position 2"]),
        ("labels", 5, 70, ["label is not the next token of the same document: row 0 from position 5"]),
        (
            "labels",
            1,
            288,
            [
                "label outside the model's vocabulary of 288 (model.backbone.vocab_size): row 0 from position 1",
                "label is not the next token of the same document: row 0 from position 1",
            ],
        ),
        (
            "tokens",
            0,
            288,
            [
                "token id outside the model's vocabulary of 288 (model.backbone.vocab_size): row 0 from position 0",
                "token id that the tokenizer does not use: row 0 from position 0",
            ],
        ),
        (
            "tokens",
            0,
            -1,
            [
                "token id outside the model's vocabulary of 288 (model.backbone.vocab_size): row 0 from position 0",
                "token id that the tokenizer does not use: row 0 from position 0",
            ],
        ),
        (
            "document_ids",
            5,
            0,
            ["document id comes back after another document's: row 0 from position 5"],
        ),
        (
            "tokens",
            0,
            EOS,
            ["end token inside a document: texts without a border between them: row 0 from position 0"],
        ),
    ],
)
def test_a_trouble_in_a_row(field: str, position: int, value: int, expected: list[str]):
    first, second = packed()
    getattr(first, field)[0, position] = value
    assert warnings(view_of(first, second)) == expected


def test_a_smaller_model_vocabulary():
    assert warnings(view_of(*packed(), vocab_size=ids("f")[0])) == [
        f"token id outside the model's vocabulary of {ids('f')[0]} (model.backbone.vocab_size): row 1 from position 5",
        f"label outside the model's vocabulary of {ids('f')[0]} (model.backbone.vocab_size): row 1 from position 4",
    ]


def test_rows_without_loss_are_named_together():
    a = ids("a")[0]
    rows = 8
    silent = batch([[a, EOS]] * rows, [[NONE, NONE]] * rows, [[0, 0]] * rows)
    assert warnings(view_of(silent)) == [
        "no position has a loss, the row trains nothing: row 0, row 1, row 2, row 3, row 4 and 3 more"
    ]


def test_a_conversation_without_a_mask():
    assert warnings(view_of(conversation(masked=False))) == [
        "conversation with loss on every token, prompts included: row 0 from position 0"
    ]


def test_padding_with_loss():
    a = ids("a")[0]
    assert warnings(view_of(batch([[a, EOS, PAD, PAD]], [[EOS, NONE, PAD, NONE]], [[0, 0, 1, 1]]))) == [
        "padding with loss: row 0 from position 2"
    ]
