"""The command line of a function in app/commands: positional parameters first, keyword-only ones as options."""

import importlib
import inspect
import re
import types
import typing
from argparse import Action
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from app.explain import explain
from app.options import check_local
from modules.errors import UserError

RUN = "--config FILE --key=value"
"""How the help shows that a command takes the command line of `fit` beside its own options."""


class HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's help with paragraphs kept apart, and no type where the usage lists the values."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(fill(paragraph, width, indent) for paragraph in text.split("\n\n"))

    def _get_type_str(self, action: Action) -> str | None:
        name = super()._get_type_str(action)
        if name is None or name.startswith("Literal["):
            return None
        return name.removeprefix("<class '").removesuffix("'>")


class CommandParser(ArgumentParser):
    """jsonargparse's parser with errors of one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a UserError with the essence of a message of jsonargparse."""
        key, reason = explain(message, ex)
        answer = f"--{key}: {reason}" if key else reason
        if not reason:
            options = [option.removeprefix("--") for option in self._option_string_actions if option.startswith("--")]
            near = get_close_matches(key, options, n=1)
            answer = f"unknown option --{key}" + (f", did you mean --{near[0]}?" if near else "")
        raise UserError(f"{answer}; see {self.prog} --help") from ex


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
    parameters = inspect.signature(function).parameters.values()
    run: list[str] = []
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        args, run = split(args, list(parser._option_string_actions))
    values = vars(parser.instantiate(parser.parse_args(args)))
    for name, value in values.items():
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, Path):
                check_local(str(path), name)
    positional: list[Any] = []
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional += [*run, *values.pop(parameter.name)]
        elif parameter.kind is not parameter.KEYWORD_ONLY:
            positional.append(values.pop(parameter.name))
    result = function(*positional, **values)
    return result if isinstance(result, int) else 0


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
    parser = CommandParser(prog=f"python -m app {command}", description=description, formatter_class=HelpFormatter)
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
