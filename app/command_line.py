"""The command line of a function in app/commands: positional parameters first, keyword-only ones as options."""

import importlib
import inspect
import re
import types
import typing
from argparse import Action
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from app import environment
from app.explain import explain
from app.options import check_local
from app.run_keys import check_run, wants_text
from modules.errors import UserError

RUN = "--config FILE --key=value"
"""How the help shows that a command takes the command line of `fit` beside its own options."""


BOOLEANS = ("true", "false", "yes", "no")
MISSING = re.compile(r"the following arguments are required: (.*)")


class HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's help with paragraphs kept apart, and no type where the usage lists the values."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(fill(paragraph, width, indent) for paragraph in text.split("\n\n"))

    def _get_type_str(self, action: Action) -> str | None:
        name = super()._get_type_str(action)
        if name is None or name.startswith("Literal["):
            return None
        name = re.sub(r"Annotated\[(\w+), <[^>]*>\]", r"\1", name)
        return name.removeprefix("<class '").removesuffix("'>")


class CommandParser(ArgumentParser):
    """jsonargparse's parser with errors of one line."""

    example: str
    """A command line that works."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a UserError with the essence of a message of jsonargparse."""
        if found := MISSING.search(message):
            raise UserError(self._missing(found[1].split(", ")[0])) from ex
        key, reason = explain(message, ex)
        reason = re.sub(r"^argument (--\w+): expected (?:one|at least one) argument$", r"\1 needs a value", reason)
        answer = f"--{key}: {reason}" if key else reason
        if not reason:
            options = [option.removeprefix("--") for option in self._option_string_actions if option.startswith("--")]
            near = get_close_matches(key, options, n=1)
            answer = f"unknown option --{key}" + (f", did you mean --{near[0]}?" if near else "")
            if key in [action.dest for action in self._actions if not action.option_strings]:
                answer = f"--{key}: {key.upper()} is given without --{key}, by its place"
        raise UserError(f"{answer}; see {self.prog} --help") from ex

    def _missing(self, name: str) -> str:
        """Return the message for an argument that is not given: what it means, and a command line that has it."""
        action = next(action for action in self._actions if action.dest == name)
        meaning = shorten((action.help or "").partition(". ")[0].rstrip("."), 140, placeholder=" ...")
        shown = f"--{name}" if action.option_strings else name.upper()
        return f"missing {shown}: {meaning}; for example {self.example}"


def call(command: str, args: list[str]) -> int:
    """Parse a command line by the signature of a command's function, and call it.

    Args:
        command: name of a file in app/commands and of the function in it.
        args: command line after the command's name.

    Returns:
        What the function returns if that is a number, else 0.

    Raises:
        UserError: the command line is wrong.
    """
    function = getattr(importlib.import_module(f"app.commands.{command}"), command)
    parser = build_parser(command, function)
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    run: list[str] = []
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        args, run = split(args, list(parser._option_string_actions))
        if not wants_text(args):
            check_run(run, "fit")
    args = complete_flags(args, [f"--{name}" for name, hint in hints.items() if hint is bool])
    values = vars(parser.instantiate(parser.parse_args(args)))
    positional: list[Any] = []
    for parameter in parameters:
        name = parameter.name
        shown = f"--{name}" if parameter.kind is parameter.KEYWORD_ONLY else name
        values[name] = check_paths(shown, hints[name], values[name])
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional += [*run, *values.pop(name)]
        elif parameter.kind is not parameter.KEYWORD_ONLY:
            positional.append(values.pop(name))
    result = function(*positional, **values)
    return result if isinstance(result, int) else 0


def check_paths(name: str, hint: Any, value: Any) -> Any:
    """Let the type of a parameter (`app/options.py`) look at the paths it was given, and return what they stand for.

    Args:
        name: how to call the parameter in a message.
        hint: its type.
        value: what it was given: a path, several, or anything else.

    Raises:
        UserError: a path is not what the parameter needs.
    """
    if isinstance(value, list):
        return [check_paths(name, hint, item) for item in value]
    if isinstance(value, Path):
        check_local(str(value), name)
    for check in _checks(hint) if isinstance(value, Path) else ():
        try:
            value = check(value)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    return value


def _checks(hint: Any) -> list[Callable[[Path], Path]]:
    """Return the functions in the Annotated types within a type."""
    own: list[Callable[[Path], Path]] = list(getattr(hint, "__metadata__", ()))
    return own + [check for inner in typing.get_args(hint) for check in _checks(inner)]


def complete_flags(args: list[str], flags: list[str]) -> list[str]:
    """Return a command line with `=true` behind each of the flags that stands alone."""
    pairs = zip(args, [*args, ""][1:], strict=True)
    return [f"{word}=true" if word in flags and after.lower() not in BOOLEANS else word for word, after in pairs]


def split(args: list[str], options: list[str]) -> tuple[list[str], list[str]]:
    """Divide a command line between the options of a command, misspelt ones too, and the parser of run files."""
    own: list[str] = []
    others: list[str] = []
    part = others
    for argument in args:
        if re.match("--?[a-zA-Z]", argument):
            part = own if get_close_matches(argument.partition("=")[0], options, cutoff=0.8) else others
        part.append(argument)
    return own, others


def build_parser(command: str, function: Any) -> CommandParser:
    """Return the parser of a command's function.

    Positional parameters become positional arguments (a list takes one or more values), keyword-only ones options (a
    list: an option that may be given several times, one of numbers also with several values after it); `*arguments`
    is a command line of `fit`. Their documentation becomes the help.
    """
    import docstring_parser

    documentation = docstring_parser.parse(inspect.getdoc(function) or "")
    described = {parameter.arg_name: parameter.description or "" for parameter in documentation.params}
    description = "\n\n".join(filter(None, [documentation.short_description, documentation.long_description]))
    parser = CommandParser(
        prog=f"{environment.command()} {command}", description=description, formatter_class=HelpFormatter
    )
    parser.example = " ".join(example.description or "" for example in documentation.examples).partition("\n")[0]
    if documentation.examples:
        parser.epilog = environment.as_started(f"example: {parser.example}")
    hints = typing.get_type_hints(function)
    options: set[str] = set()
    for name, parameter in inspect.signature(function).parameters.items():
        item, many = _item(hints[name])
        required = parameter.default is parameter.empty
        given: dict[str, Any] = {"help": described.get(name), "type": item}
        if parameter.kind is parameter.KEYWORD_ONLY and many:
            # jsonargparse cannot append numbers; strings are not extended, or an option would take a MODEL after it
            several = {"action": "extend", "nargs": "+"} if item in (int, float) else {"action": "append"}
            parser.add_argument(f"--{name}", required=required, **several, **given)
        elif parameter.kind is parameter.KEYWORD_ONLY:
            options.add(name)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            parser.add_argument(name, nargs="*", metavar=RUN, **given)
        elif not required:
            parser.add_argument(name, nargs="?", default=parameter.default, **given)
        else:
            parser.add_argument(name, nargs="+" if many else None, **given)
    skip: set[str | int] = {name for name in inspect.signature(function).parameters if name not in options}
    parser.add_function_arguments(function, as_group=False, skip=skip)
    return parser


def _item(hint: Any) -> tuple[Any, bool]:
    """Return (X, True) for list[X] and list[X] | None, else (the hint itself, False)."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    items = [typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is list]
    return (items[0], True) if items else (hint, False)
