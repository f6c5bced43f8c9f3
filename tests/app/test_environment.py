"""Outside the project's environment one line says how to get into it; commands for a person are those of its shell."""

import ast
import subprocess
import sys

import pytest

from app import environment
from tests.app.helpers import ROOT


def test_a_python_without_the_packages_says_how_to_get_into_the_environment():
    command = [sys.executable, "-S", "-m", "app", "fit", "--config", "configs/pretrain.yaml"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {sys.executable} has no torch: it is not the project's environment; run ")
    assert "source .venv/bin/activate" in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_older_python_is_named(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 8, 18))
    assert "is Python 3.8, and Python 3.11 or 3.12 is needed" in environment.problem()
    monkeypatch.undo()
    assert environment.problem() == ""


@pytest.mark.parametrize("file", ["__init__.py", "__main__.py", "environment.py"])
def test_older_pythons_can_read_what_they_come_by(file: str):
    ast.parse((ROOT / "app" / file).read_text(encoding="utf-8"), feature_version=(3, 7))


@pytest.mark.parametrize(
    ("script", "typed", "module", "command"),
    [
        (f"{ROOT}/app/__main__.py", "python", "app", "python -m app"),
        (f"{ROOT}/app/__main__.py", ".venv/bin/python", "app.tensorboard", ".venv/bin/python -m app.tensorboard"),
        (f"{ROOT}/app/__main__.py", "my env/python", "app", "'my env/python' -m app"),
        ("/elsewhere/bin/superbolt", "/elsewhere/bin/python", "app", "/elsewhere/bin/superbolt"),
        ("/elsewhere/bin/superbolt", "/x/python", "app.tensorboard", "/elsewhere/bin/python -m app.tensorboard"),
        ("/usr/bin/pytest", "/usr/bin/python", "app", "python -m app"),
    ],
)
def test_a_command_is_given_as_the_program_was_started(monkeypatch, script, typed, module, command):
    monkeypatch.setattr(sys, "argv", [script])
    monkeypatch.setattr(sys, "orig_argv", [typed])
    assert environment.command(module) == command


def test_commands_in_a_text_are_those_of_the_shell(monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{ROOT}/app/__main__.py"])
    monkeypatch.setattr(sys, "orig_argv", [".venv/bin/python"])
    assert environment.as_started("see python -m app fit --help") == "see .venv/bin/python -m app fit --help"
