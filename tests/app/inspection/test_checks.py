"""Each trouble planted in a sound batch is named once, with its row and position; the sound batch is left alone."""

import pytest

from app.inspection.checks import mask_errors, warnings
from modules.batch import PackedBatch
from tests.app.inspection.helpers import (
    CHAT_END,
    CHAT_START,
    END_THINK,
    EOS,
    NONE,
    PAD,
    THINK,
    asked,
    batch,
    ids,
    packed,
    talks,
    view_of,
)


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


def changed(start: int, stop: int, learnt: bool) -> tuple[list[int], list[bool]]:
    """A conversation of 12 tokens whose answer and its end, 8 to 10, are learnt, but for these."""
    tokens, mask = asked("why?", "so")
    return tokens, [*mask[:start], *[learnt] * (stop - start), *mask[stop:]]


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        (changed(0, 0, True), None),
        (changed(11, 12, True), None),  # the line break behind the end
        (changed(0, 12, False), "the mask is empty: nothing would be learnt"),
        (changed(0, 12, True), "the mask is whole: prompts would be learnt too"),
        (changed(10, 11, False), "the mask lacks the token that ends the turn at token 8"),
        (changed(6, 8, True), None),
        (changed(3, 8, True), "the mask of the turn at token 3 goes beyond its end"),
        ((asked("why?", "so")[0][:10], asked("why?", "so")[1][:10]), None),  # cut in the middle of the answer
    ],
)
@pytest.mark.parametrize("before", [0, 2])
def test_masks_that_cannot_be_meant(conversation: tuple[list[int], list[bool]], reason: str | None, before: int):
    view = view_of(talks(*[asked("a", "b")] * before, conversation))
    place = f"row 0 (corpus row 0), conversation {before} from position {8 * before}"
    assert mask_errors(view, CHAT_END, True) == ([] if reason is None else [f"{place}: {reason}"])


def test_an_empty_thought_is_not_to_be_written():
    tokens, mask = asked("why?", "so")
    tokens, mask = [*tokens[:8], THINK, END_THINK, *tokens[8:]], [*mask[:8], True, True, *mask[8:]]
    view = view_of(talks((tokens, mask)))
    assert mask_errors(view, CHAT_END, False) == []
    (line,) = mask_errors(view, CHAT_END, True)
    assert line.endswith("position 0: the mask holds an empty thought, which a template inserts")
    given = [*mask[:8], False, False, *mask[10:]]
    assert mask_errors(view_of(talks((tokens, given))), CHAT_END, True) == []


def test_a_conversation_in_a_batch_of_conversations_is_no_warning():
    assert warnings(view_of(talks(changed(0, 12, True)))) == []
