"""Functions become commands: positional parameters first, keyword-only ones as options."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest

from app.command_line import build_parser, call
from modules.errors import UserError

CALLS = []


def pack(
    paths: list[str],
    *,
    output: str,
    also: list[str],
    but: list[str] | None = None,
    workers: int = 2,
    fraction: float | None = None,
) -> int | None:
    """Pack files.

    And more about it.

    Args:
        paths: Files to pack.
        output: Folder to write.
        also: More.
        but: Less.
        workers: Processes.
        fraction: Share.

    Example:
        python -m app pack a --output b --also c
    """
    CALLS.append((paths, output, also, workers, fraction))
    if but is not None:
        CALLS.append(but)
    return 3 if workers == 9 else None


@pytest.fixture(autouse=True)
def command(monkeypatch):
    module = ModuleType("app.commands.pack")
    module.pack = pack
    monkeypatch.setitem(sys.modules, "app.commands.pack", module)
    CALLS.clear()


def test_arguments_reach_the_function():
    assert call("pack", ["a", "b", "--output", "c", "--also", "d", "--also=e", "--fraction=0.5"]) == 0
    assert CALLS == [(["a", "b"], "c", ["d", "e"], 2, 0.5)]


@pytest.mark.parametrize(
    "args", [["--share", "1", "2.5"], ["--share=1", "--share=2.5"], ["--share", "1", "--share=2.5"]]
)
def test_a_list_of_numbers_takes_several_values(monkeypatch, args):
    def weigh(paths: list[str], *, share: list[float] | None = None) -> None:
        CALLS.append((paths, share))

    monkeypatch.setattr(sys.modules["app.commands.pack"], "pack", weigh)
    call("pack", ["a", "b", *args])
    call("pack", ["a"])
    assert CALLS == [(["a", "b"], [1.0, 2.5]), (["a"], None)]


def test_an_option_that_may_come_several_times_may_be_left_out():
    assert call("pack", ["a", "--output=c", "--also=d", "--but", "x", "--but=-y"]) == 0
    assert CALLS[1:] == [["x", "-y"]]


def test_a_number_is_the_exit_code():
    assert call("pack", ["a", "--output=c", "--also=d", "--workers=9"]) == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a", "--output=c", "--also=d", "--workers=many"], "--workers: expected int, got many"),
        (["a", "--output=c", "--wrokers=1"], "unknown option --wrokers, did you mean --workers?"),
    ],
)
def test_mistakes_are_one_line(args, message):
    with pytest.raises(UserError) as caught:
        call("pack", args)
    assert message in str(caught.value)
    assert "see python -m app pack --help" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_option_of_a_command_is_for_the_parser_of_run_files(monkeypatch):
    def weigh(*arguments: str, share: float = 0, kind: str = "a") -> None:
        """Weigh.

        Args:
            arguments: As fit has them.
        """
        CALLS.append((arguments, share, kind))

    monkeypatch.setattr("app.command_line.check_run", lambda args, command: None)
    monkeypatch.setattr(sys.modules["app.commands.pack"], "pack", weigh)
    call("pack", ["-c", "a", "--share", "-1", "--b.c=--share", "--b.d", "-2", "--kind=c", "--kinds.of=e", "f"])
    call("pack", ["a", "--share=2", "b"])
    assert CALLS == [
        (("-c", "a", "--b.c=--share", "--b.d", "-2", "--kinds.of=e", "f"), -1, "c"),
        (("a", "b"), 2, "a"),
    ]
    with pytest.raises(UserError, match="unknown option --shrae, did you mean --share"):
        call("pack", ["--shrae=2"])
    text = build_parser("weigh", weigh).format_help()
    assert "[--config FILE --key=value ...]" in text
    assert "As fit has them." in text


def test_help_names_types_as_people_do_and_keeps_paragraphs():
    def wrap(folder: Path, *, kind: Literal["a", "b"] = "a") -> None:
        """Wrap.

        And more about it.

        Args:
            folder: Folder to wrap.
            kind: How.
        """

    text = build_parser("wrap", wrap).format_help()
    assert "Wrap.\n\nAnd more about it.\n" in text
    assert "(required, type: Path)" in text
    assert "{a,b}" in text
    assert "How. (default: a)" in text
    with pytest.raises(UserError, match="--kind: expected one of a, b, got c"):
        build_parser("wrap", wrap).parse_args(["x", "--kind", "c"])


def test_help_comes_from_the_documentation():
    text = build_parser("pack", pack).format_help()
    for part in ("Pack files.", "And more about it.", "Files to pack.", "Folder to write.", "default: 2"):
        assert part in text
