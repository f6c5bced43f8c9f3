"""What jsonargparse means, in a few words.

Its messages nest: a key, in it a union of types with one error each, in it a class with a problem, in it a key again.
`explain` walks down to the innermost and returns the whole dotted key with the reason found there.
"""

import re
import textwrap
from typing import NamedTuple


class Refusal(NamedTuple):
    """Why a value or key was refused."""

    key: str
    """Dotted key as far as the message tells it; empty if it does not."""
    reason: str
    """What is wrong; for an unknown key: empty."""
    unknown: bool = False
    """Whether the key itself is not known."""


def explain(message: str, key: str = "") -> Refusal:
    """Return the innermost reason of a message.

    Args:
        message: message of jsonargparse.
        key: dotted key under which it stands.
    """
    text = textwrap.dedent(message).strip()
    if found := re.match(r'Parser key "([^"]+)":\s*', text):
        return explain(_rest(text, found), _join(key, found[1]))
    if text.startswith("Does not validate against any of the Union subtypes") or text.startswith("- "):
        return _explain_union(text, key)
    if found := re.match(r"Problem with given class_path '([^']+)':\s*", text):
        inner = explain(_rest(text, found), _join(key, "init_args") if "." not in key else key)
        if inner.key not in (key, f"{key}.init_args") or inner.reason.startswith("missing"):
            return inner
        return Refusal(key, f"class_path {found[1]}: {inner.reason}")
    if found := re.match(r"Import path (\S+) does not correspond to a subclass of (\w+)", text):
        return Refusal(key, f"class_path {found[1]} is no {found[2]}")
    if found := re.match(r"Expected a dot import path string: (\S+)", text):
        return Refusal(key, f"expected a class path like package.module.Class, got {found[1]}")
    if found := re.match(r"(?:Group '(\S+)' does not accept option|Option) '(\S+)'", text):
        return Refusal(_join(key, found[1] or "", found[2]), "", unknown=True)
    if found := re.match(r"unrecognized arguments: --([^\s=]+)", text):
        return Refusal(_join(key, found[1]), "", unknown=True)
    if found := re.match(r"the following arguments are required: (.+)", text):
        names = ", ".join(_join(key, name.strip()) for name in found[1].split(","))
        return Refusal(key, f"missing key {names}")
    if found := re.match(r"Unable to load config ['\"](.+?)['\"]", text):
        return Refusal(key, f"{found[1]} is not there or no YAML file")
    if found := re.match(r"Expected an? (.+?)\. Got value: (.*)", text, re.DOTALL):
        return Refusal(key, f"expected {_kind(found[1])}, got {found[2]}")
    return Refusal(key, " ".join(text.split()))


def _explain_union(text: str, key: str) -> Refusal:
    """Return the error of the member that got farthest; the kinds asked for if none got anywhere."""
    body = text.partition("Errors:\n")[2].rpartition("Given value type:")[0] or text  # unions inside have their own
    items = [item.strip() for item in re.split(r"(?m)^- ", textwrap.dedent(body)) if item.strip()]
    items = [item for item in items if not re.fullmatch(r"Expected a <class 'NoneType'>\.?", item)]
    starts = ("Parser key", "Problem with", "Import path", "Expected a dot import", "Does not validate")
    for start in starts:
        for item in items:
            if item.startswith(start):
                return explain(item.replace("\n  ", "\n"), key)
    kinds = re.search(r"Subtypes: \[(.*)\]", text)
    given = re.search(r"Given value: (.*)", text, re.DOTALL)
    if kinds and given:
        names = " or ".join(_kind(kind) for kind in re.split(r",\s+(?![^\[]*\])", kinds[1]))
        return Refusal(key, f"expected {names}, got {given[1]}")
    return Refusal(key, " ".join(" ".join(items).split()))


def _kind(kind: str) -> str:
    name = re.sub(r"<(?:class|enum) '(?:[\w.]+\.)?(\w+)'>", r"\1", kind.strip()).replace("typing.", "")
    if found := re.fullmatch(r"Literal\[(.*)\]", name):
        return "one of " + found[1].replace("'", "")
    return "null" if name == "NoneType" else name


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _rest(text: str, found: re.Match[str]) -> str:
    rest = text[found.end() :]
    first, _, others = rest.partition("\n")
    return first + "\n" + textwrap.dedent(others)
