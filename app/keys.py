"""Which keys a run file may have, so that an unknown one is named in full and answered with the nearest.

jsonargparse refuses most unknown keys, but says `Option 'lrr' is not accepted` without the place and the file, and lets
an empty unknown group pass. So the files are checked first, by the types that the parser itself goes by.
"""

import dataclasses
import difflib
import importlib
import types
import typing
from contextlib import suppress
from typing import Any

from jsonargparse import ArgumentParser

from modules.errors import UserError

Keys = dict[str, Any]
"""Key -> type of its value (`Any` where unknown)."""


def check_keys(tree: Any, kind: Any, source: str, path: str, owned: dict[str, str]) -> None:
    """Raise a UserError for the first key in a file that nothing knows, or list where keys belong.

    Args:
        tree: what the file holds at `path`.
        kind: type of the value there, or a dictionary of keys and types.
        source: name of the file.
        path: dotted key of the value; empty at the top.
        owned: dotted keys that exist elsewhere but not here, with what to use instead.
    """
    if isinstance(tree, list):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            raise UserError(f"{source}: {path} is a list; it holds keys: {', '.join(parameters_of(kind) or ())}")
        for index, value in enumerate(tree):
            for item in _arguments(kind):
                check_keys(value, item, source, f"{path}[{index}]", owned)
    if not isinstance(tree, dict):
        return
    keys = keys_of(kind, tree)
    if keys is None:
        return
    for key, value in tree.items():
        name = f"{path}.{key}" if path else str(key)
        if key not in keys:
            raise UserError(unknown_key(name, keys, owned, source))
        check_keys(value, keys[key], source, name, owned)


def unknown_key(name: str, keys: Keys, owned: dict[str, str], source: str = "") -> str:
    """Return the message for an unknown key: where it is, and what was probably meant."""
    start = f"{source}: " if source else ""
    if name in owned:
        return f"{start}{name} is not set here: {owned[name]}"
    key = name.rpartition(".")[2]
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    mend = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(keys))}"
    return f"{start}unknown key {name}; {mend}"


def keys_of(kind: Any, tree: Any) -> Keys | None:
    """Return the keys that a value may have, or None where any may be right (a free dictionary, unknown types).

    Args:
        kind: type of the value, or a dictionary of keys and types.
        tree: the value in the file; a `class_path` in it says which class.
    """
    if isinstance(kind, dict):
        return kind
    if isinstance(tree, dict) and isinstance(tree.get("class_path"), str):
        chosen = _import(tree["class_path"])
        if isinstance(kind, type) and not (isinstance(chosen, type) and issubclass(chosen, kind)):
            return None  # the parser says so itself
        parameters = None if chosen is None else parameters_of(chosen)
        return {"class_path": str, "init_args": Any if parameters is None else parameters, "dict_kwargs": Any}
    classes = [kind, *_arguments(kind)]
    for candidate in classes:
        if dataclasses.is_dataclass(candidate) and isinstance(candidate, type):
            return parameters_of(candidate)
    return None


def parameters_of(chosen: Any) -> Keys | None:
    """Return the names and types of a class's or function's parameters as the parser knows them, None if it cannot."""
    parser, is_class = ArgumentParser(), isinstance(chosen, type)
    try:
        names = (parser.add_class_arguments if is_class else parser.add_function_arguments)(chosen, fail_untyped=False)
    except (TypeError, ValueError, AttributeError):
        return None
    keys: Keys = dict.fromkeys(names, Any)
    for function in [base.__init__ for base in reversed(chosen.__mro__)] if is_class else [chosen]:
        with suppress(NameError):  # a type that only type checkers import
            keys |= {name: hint for name, hint in typing.get_type_hints(function).items() if name in keys}
    return keys


def find(keys: Keys, tree: Any, path: list[str]) -> Keys | None:
    """Return the keys known at a dotted path of a run file, or None if that cannot be told."""
    kind: Any = keys
    for name in path:
        known = keys_of(kind, tree)
        if known is None or name not in known:
            return None
        kind, tree = known[name], tree.get(name) if isinstance(tree, dict) else None
    return keys_of(kind, tree)


def _arguments(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the item type of a list, flattened."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType, list, tuple, typing.Annotated):
        return tuple(inner for item in typing.get_args(kind) for inner in (item, *_arguments(item)))
    return ()


def _import(class_path: str) -> Any | None:
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):
        return None  # the parser says so itself
