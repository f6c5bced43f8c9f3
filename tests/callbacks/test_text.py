"""Lines for the console."""

from callbacks.text import WIDTH, entry, fold, quote


def test_long_lines_are_broken_between_words():
    line = "warning: step 12: " + ", ".join(f"layer_{number:02d}.experts.up_proj" for number in range(20))
    folded = fold(line)
    assert max(map(len, folded.splitlines())) <= WIDTH
    assert " ".join(folded.split()) == line


def test_a_path_stays_whole():
    path = "/" + "/".join(["folder"] * 40)
    assert path in fold(f"curves: {path}").split()


def test_short_lines_stay_as_they_are():
    assert fold("precision   *        fp32   41  100.0%") == "precision   *        fp32   41  100.0%"


def test_an_entry_of_the_table_goes_on_below_its_text():
    first, *rest = entry("peak", "word " * 40).splitlines()
    assert first.startswith("peak        word")
    assert rest
    assert all(line.startswith(" " * 12 + "word") for line in rest)


def test_a_text_keeps_its_lines_and_loses_no_character():
    text = "def f():\n\treturn 1\n\n" + "x" * 250
    shown = quote(text)
    assert max(map(len, shown.splitlines())) <= WIDTH
    lines = [line[4:] for line in shown.split("\n")]
    assert lines[:3] == ["def f():", "    return 1", ""]
    assert "".join(line.removeprefix("↪ ") for line in lines[3:]) == "x" * 250
    assert all(line.startswith("↪ ") for line in lines[4:])


def test_no_text_steers_the_terminal():
    assert quote("a\x1b[2Jb\r\x07\x9bc\u202ed") == "    a␛[2Jb␍␇⟨009B⟩c⟨202E⟩d"
