from app.inspection.view import caption, heading, share, summary
from tests.app.inspection.helpers import EOS, NONE, PAD, asked, batch, ids, packed, talks, view_of


def test_rows_documents_and_padding():
    view = view_of(*packed())
    first, second = view.rows
    assert [(row.number, row.micro_batch, row.place, row.origin) for row in view.rows] == [
        (0, 0, 0, "corpus row 0"),
        (1, 1, 0, "corpus row 1"),
    ]
    spans = [(d.id, d.start, d.end, d.padding, d.with_loss, d.complete) for d in first.documents]
    assert spans == [(0, 0, 3, False, 2, True), (1, 3, 5, False, 1, True), (2, 5, 6, True, 0, False)]
    (whole,) = second.documents
    assert (whole.length, whole.padding, whole.with_loss, whole.complete) == (6, False, 5, False)
    assert [token.text for token in first.shown(view.vocabulary)] == ["a", "b", "</s>", "c", "</s>", "<unk>"]


def test_targets_of_the_next_token_and_of_mtp():
    b, c, d, e, f = ids("bcdef")
    first, second = view_of(*packed()).rows
    assert first.targets(1) == [[b, EOS, NONE, EOS, NONE, NONE], [EOS, NONE, NONE, NONE, NONE, NONE]]
    assert second.targets(2) == [[b, c, d, e, f, NONE], [c, d, e, f, NONE, NONE], [d, e, f, NONE, NONE, NONE]]


def test_the_summary_by_hand():
    assert summary(view_of(*packed())) == [
        ("rows", "2 of 6 positions, in 2 micro-batches"),
        ("positions", "12"),
        ("with loss", "8 (66.7%)"),
        ("padding", "1 (8.3%)"),
        ("documents", "3 (1.5 a row)"),
        ("lengths", "2 to 6 tokens, median 3"),
        ("cut", "1 (33.3%) do not end with the end token: they go on in another row"),
        ("targets", "next token 8, MTP depth 1 5"),
    ]


def test_lines_above_rows_and_documents():
    first, second = view_of(*packed()).rows
    assert (
        heading(first) == "corpus row 0; micro-batch 0, row 0 in it; 2 documents; 3 of 6 positions with loss; 1 padding"
    )
    assert caption(first.documents[1], 1) == "document 1: positions 3-4, 2 tokens, 1 with loss"
    assert caption(first.documents[2], 2) == "padding: positions 5-5, 1 token"
    assert caption(second.documents[0], 0) == "document 0: positions 0-5, 6 tokens, 5 with loss, cut at its end"


def test_only_the_end_of_a_row_without_labels_is_padding():
    middle = view_of(batch([[PAD, PAD, *ids("a")]], [[NONE] * 3], [[0, 0, 1]]))
    assert [document.padding for document in middle.rows[0].documents] == [False, False]
    labelled = view_of(batch([[*ids("a"), PAD, PAD]], [[NONE, PAD, NONE]], [[0, 1, 1]]))
    assert [document.padding for document in labelled.rows[0].documents] == [False, False]
    empty = view_of(batch([[PAD, PAD]], [[NONE, NONE]], [[0, 0]]))
    assert empty.rows[0].documents[0].padding
    assert ("documents", "0 (0.0 a row)") in summary(empty)


def test_shares_are_whole_only_where_they_are():
    assert [share(0, 9), share(9, 9), share(1, 9)] == ["0.0%", "100.0%", "11.1%"]
    assert [share(1, 10**6), share(10**6 - 1, 10**6)] == ["under 0.1%", "over 99.9%"]


def test_conversations():
    cut = (asked("q", "answer")[0][:9], asked("q", "answer")[1][:9])
    view = view_of(talks(asked("why?", "so"), cut, asked("q", "a"), weights=[1, 2, 0.5]))
    (row,) = view.rows
    taught = [view.vocabulary.show([token])[0].text for token in row.tokens[row.supervised].tolist()]
    assert taught == ["s", "o", "<|im_end|>", *"answ", "a", "<|im_end|>"], "the tokens to write, not those before them"
    assert [(d.complete, d.weight) for d in row.documents] == [(True, 1.0), (False, 2.0), (True, 0.5)]
    assert abs(sum(document.share for document in row.documents) - 1) < 1e-6
    assert caption(row.documents[1], 1) == (
        "conversation 1: positions 12-20, 9 tokens, 4 with loss, weight 2, 44.44% of the step's loss, cut at its end"
    )
    assert "3 conversations; 9 of 29 positions with loss; no padding" in heading(row)
    assert ("conversations", "3 (3.0 a row)") in summary(view)
    assert ("cut", "1 (33.3%) do not end with the end of a turn: they were cut") in summary(view)
