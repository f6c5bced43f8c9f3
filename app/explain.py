"""What jsonargparse means, in one line.

Its errors nest: a key, in it a union of types, in it a class with a problem, in it a key again. Each level is an
exception that the next one caused, so the whole key and the innermost message are read off the chain.
"""

import re
from argparse import ArgumentError

from yaml import YAMLError

_OUTSIDE = (ImportError, AttributeError, YAMLError)
"""Errors of others: the level above says what could not be imported or read."""
_KEY = re.compile(r'Parser key "([^"]+)"[^:]*:\s*')
_UNION = re.compile(r"Does not validate against any of the Union subtypes\nSubtypes: \[(.*)\]\n")
_OTHER_KIND = re.compile(r"(?:Expected an?|Not a valid subclass of) (.+?)\. Got value: ?(.*)")
_UNKNOWN = re.compile(r"(?:(?:Group '(\S+)' does not accept o|O)ption '|unrecognized arguments: --)([^\s'=]+)")
_PROBLEM = re.compile(r"Problem with given class_path '([^']+)':\s*(.+)")
_MISSING = re.compile(r"the following arguments are required: (.*)")


def explain(message: str, error: BaseException | None) -> tuple[str, str]:
    """Return the dotted key that an error of jsonargparse is about, and what is wrong with it.

    Args:
        message: message of the error.
        error: the error itself; None where jsonargparse has none.

    Returns:
        The key, empty if none is named; the reason, empty if it is that nothing knows the key.
    """
    keys: list[str] = []
    problem = _PROBLEM.search(message)
    named, union = False, None
    while error is not None and not isinstance(error, _OUTSIDE):
        if isinstance(error, ArgumentError) and len(keys) == 1:  # of a parser for what a class takes
            keys.append("init_args")
        union, message = _UNION.match(message), str(error).strip()
        found = _KEY.match(message)
        if found:
            keys[len(keys) - named :] = [found[1]]  # right below another it is the same key, or reaches deeper
        named, error = found is not None, error.__cause__
    reason = " ".join(_KEY.sub("", message, count=1).partition("Subclass types expect one of")[0].split())
    if found := _UNKNOWN.match(reason):
        return _join(*keys, found[1], found[2]), ""
    other_kind = _OTHER_KIND.match(reason)
    if (
        other_kind and problem and not problem[2].startswith("Parser key")
    ):  # of the one member of the union that was meant
        reason, other_kind = (problem[2] if _MISSING.match(problem[2]) else problem[0]), None
        reason = " ".join(reason.split())
    if found := _MISSING.match(reason):
        return "", "missing key " + ", ".join(_join(*keys, name) for name in found[1].split(", "))
    if found := other_kind:
        reason = f"expected {_kinds(union[1] if union else found[1])}, got {found[2] or 'nothing'}"
    return _join(*keys), reason


def _join(*keys: str | None) -> str:
    return ".".join(filter(None, keys))


def _kinds(types: str) -> str:
    """Return types as a user calls them: `<class 'int'>, <class 'NoneType'>` is `int or null`."""
    types = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", types)
    names = re.sub(r"<\w+ '(\w+)'>", r"\1", types.replace("typing.", "")).replace("NoneType", "null")
    kinds = re.split(r", (?![^\[]*\])", names.replace("'", ""))
    return " or ".join(re.sub(r"^Literal\[(.*)\]$", r"one of \1", kind) for kind in kinds)
