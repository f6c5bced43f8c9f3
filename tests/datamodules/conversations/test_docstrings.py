"""Instruction pairs from docstrings: what is asked and answered, what is left out, the real standard library."""

import importlib
import inspect
from pathlib import Path

import pytest

from datamodules.conversations.docstrings import docstring_conversations

SOURCES = {
    "shapes/__init__.py": '''
class Square:
    """A shape with four sides. It is even."""

    def area(self, unit=None):
        """Return the area."""

    def _hidden(self):
        """Not for anybody."""
''',
    "shapes/round.py": '''
def turn(angle: float = 90.0, *, left=True):
    """Turn to
    one side.

    More about it.
    """

def flip():
    """Turn to one side."""

def wordless():
    pass

def fragment():
    """no sentence"""
''',
    "_private.py": 'def f():\n    """Do a thing."""\n',
    "test/helper.py": 'def f():\n    """Do a thing."""\n',
    "twice.py": 'def f():\n    """Do this."""\ndef f():\n    """Do that."""\n',
    "not-a-module.py": "this is no Python",
}


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    for name, text in SOURCES.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return tmp_path


def pairs(root: Path | None = None) -> dict[str, str]:
    found = {}
    for conversation in docstring_conversations(root):
        question, answer = conversation
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert question["content"] not in found
        found[question["content"]] = answer["content"]
    return found


def test_questions_and_answers_of_a_small_library(sources: Path) -> None:
    assert pairs(sources) == {
        "What does shapes.Square do?": "A shape with four sides.",
        "What in the standard library does this: A shape with four sides.": "shapes.Square",
        "What does shapes.Square.area do?": "Return the area.",
        "What in the standard library does this: Return the area.": "shapes.Square.area",
        "How is shapes.Square.area called?": "shapes.Square.area(self, unit=None)",
        "What does shapes.round.turn do?": "Turn to one side.",
        "How is shapes.round.turn called?": "shapes.round.turn(angle: float=90.0, *, left=True)",
        "What does shapes.round.flip do?": "Turn to one side.",
        "How is shapes.round.flip called?": "shapes.round.flip()",
    }


def test_the_standard_library_agrees_with_its_imported_modules() -> None:
    found = pairs()
    assert len(found) > 5000
    for name in ("textwrap.dedent", "bisect.insort_left", "shlex.quote", "statistics.median"):
        module, function = name.rsplit(".", 1)
        imported = getattr(importlib.import_module(module), function)
        documentation = " ".join((inspect.getdoc(imported) or "").split())
        assert documentation.startswith(found[f"What does {name} do?"])
        called = found[f"How is {name} called?"].removeprefix(name).replace(" ", "")
        assert called == str(inspect.signature(imported)).replace(" ", "")
