import re
import sys

import pytest

from app.inspection.terminal import Paper, cells, write_rows, write_summary
from tests.app.inspection.helpers import CHAT_START, EOS, NONE, asked, batch, ids, packed, talks, view_of

PLAIN = Paper(width=80, colour=False)


def test_short_rows_are_shown_whole():
    view = view_of(*packed())
    lines = write_rows(view, view.rows[:1], False, PLAIN)
    a, b, c = ids("abc")
    assert lines[2:] == [
        "",
        "row 0  corpus row 0; micro-batch 0, row 0 in it; 2 documents; 3 of 6 positions",
        "  with loss; 1 padding",
        "",
        "  document 0: positions 0-2, 3 tokens, 2 with loss",
        "    ab⟦«</s>»⟧",
        "    position      id  token            loss label                MTP 1",
        f"           0      {a}  'a'              yes  {b} 'b'               2 «</s>»",
        f"           1      {b}  'b'              yes  2 «</s>»             -",
        "           2       2  «</s>»           no   -                    -",
        "",
        "  document 1: positions 3-4, 2 tokens, 1 with loss",
        "    c⟦«</s>»⟧",
        "    position      id  token            loss label                MTP 1",
        f"           3      {c}  'c'              yes  2 «</s>»             -",
        "           4       2  «</s>»           no   -                    -",
        "",
        "  padding: positions 5-5, 1 token",
        "",
        "1 of the 2 rows are not shown (--rows 0-1, or all)",
    ]


def test_the_largest_losses_come_first():
    view = view_of(*packed(), losses=[[0.5, 3.0, 0.0, 7.25, 0.0, 0.0], [20.0, 2.0, 1.5, 0.0, 9.0, 0.0]])
    lines = write_summary(view, ["title"], [], PLAIN)
    place = lines.index("largest losses:")
    assert lines[place + 1 : place + 4] == [
        "   20.00 nats  row 1 position 0: 'b' after 'a'",
        "    9.00 nats  row 1 position 4: 'f' after 'abcde'",
        "    7.25 nats  row 0 position 3: '</s>' after 'c'",
    ]
    assert "largest losses:" not in write_summary(view_of(*packed()), ["title"], [], PLAIN)


def long_view():
    tokens = [*ids("word\n" * 60), EOS]
    many = [ids("x")[0], EOS] * 4
    length = len(tokens)
    documents = [0] * length + [1 + n // 2 for n in range(8)]
    row = tokens + many
    labels = [row[t + 1] if t + 1 < len(row) and documents[t] == documents[t + 1] else NONE for t in range(len(row))]
    return view_of(batch([row], [labels], [documents]))


def test_long_rows_are_abbreviated_unless_all_is_asked_for():
    view = long_view()
    short = write_rows(view, view.rows, False, PLAIN)
    assert "  ... 181 tokens ..." in short
    assert "  and 2 more with 4 positions (--full true shows all)" in short
    assert sum(line == "    word↵" for line in short) == 16 + 7, "of 80 and 40 tokens, a letter each: lines stay lines"
    assert sum(re.match(r" +\d+ +\d+  ", line) is not None for line in short) == 4 + 2 + 2
    full = write_rows(view, view.rows, True, PLAIN)
    assert sum(line == "    word↵" for line in full) == 60
    assert sum(re.match(r" +\d+ +\d+  ", line) is not None for line in full) == 301 + 8
    assert not any("more" in line or "..." in line for line in full)


def test_lines_fit_the_width_also_with_wide_characters():
    text = "日本語 naïve " * 20
    tokens = ids(text)
    view = view_of(batch([tokens], [[*tokens[1:], NONE]], [[0] * len(tokens)]))
    for line in write_rows(view, view.rows, False, PLAIN)[4:]:
        assert sum(map(cells, line)) <= 80
    assert [cells(character) for character in "a日\u0301"] == [1, 2, 0]


def test_masked_stretches_are_marked():
    tokens = [CHAT_START, *ids("question"), CHAT_START, *ids("yes"), EOS]
    labels = [NONE] * 9 + [*tokens[10:], NONE]
    view = view_of(batch([tokens], [labels], [[0] * len(tokens)]))
    assert "    ⟦«<|im_start|>»question⟧«<|im_start|>»yes⟦«</s>»⟧" in write_rows(view, view.rows, False, PLAIN)


def test_what_a_model_is_taught_to_write_stands_out():
    view = view_of(talks(asked("why?", "so"), asked("q", "a")))
    lines = write_rows(view, view.rows, False, PLAIN)
    assert "    ⟦«<|im_start|>»why?«<|im_end|>»↵" in lines
    assert "    «<|im_start|>»⟧so«<|im_end|>»⟦↵" in lines
    assert "⟦⟧ no loss, the rest is what the model is taught to write" in lines[1]
    colour = "\n".join(write_rows(view, view.rows, False, Paper(width=80, colour=True)))
    assert re.search(r"\x1b\[(32|92)ms\x1b\[0m\x1b\[(32|92)mo\x1b", colour)


def test_of_a_long_conversation_the_turns_to_learn_stay():
    answer = "the answer " * 9
    view = view_of(talks(asked("word " * 40, answer), asked("q", "word " * 60)))
    lines = write_rows(view, view.rows, False, PLAIN)
    assert "  ... 156 tokens without loss ..." in lines
    assert answer.replace(" ", "") in "".join(lines).replace(" ", "")
    assert "  ... 181 tokens ..." in lines
    assert not any("position " in line for line in lines), "no table of tokens that are only read"
    full = write_rows(view, view.rows, True, PLAIN)
    assert not any("..." in line for line in full)
    assert sum(re.match(r" +\d+ +\d+  ", line) is not None for line in full) == len(view.rows[0].tokens)


def test_colour_changes_no_text():
    view = view_of(*packed())
    colour = Paper(width=80, colour=True)
    for lines, plain in (
        (write_rows(view, view.rows, True, colour), write_rows(view, view.rows, True, PLAIN)),
        (write_summary(view, ["title"], ["trouble"], colour), write_summary(view, ["title"], ["trouble"], PLAIN)),
    ):
        assert lines != plain
        assert [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines] == plain
    assert not any("\x1b" in line for line in write_rows(view, view.rows, True, PLAIN))


def test_the_summary_says_whether_there_are_warnings():
    view = view_of(*packed())
    assert write_summary(view, ["title", "more"], [], PLAIN)[:4] == [
        "title",
        "more",
        "",
        "  rows       2 of 6 positions, in 2 micro-batches",
    ]
    assert write_summary(view, ["title"], [], PLAIN)[-1] == "no warnings"
    assert write_summary(view, ["title"], ["bad"], PLAIN)[-1] == "warning: bad"


@pytest.mark.parametrize(
    ("terminal", "environment", "colour"),
    [
        (True, {}, True),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
        (False, {}, False),
    ],
)
def test_colour_only_where_it_is_wanted(
    terminal: bool, environment: dict[str, str], colour: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "500")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    paper = Paper.of_stdout()
    assert paper.colour is colour
    assert paper.width == (140 if terminal else 100)
