"""Which keys a run file may have, so that an unknown one is named in full and answered with the nearest.

jsonargparse refuses most unknown keys, but after seconds of imports, and says `Option 'lrr' is not accepted` without
the place and the file. So keys are checked first, by what the source of the classes says (`app/signatures.py`).
"""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from app.signatures import Kind, parameters

Keys = dict[str, Any]
"""Key -> its Kind, or the keys below it, or None: unknown, any may be right."""
OF_A_CLASS = ("class_path", "init_args", "dict_kwargs")


class Place(NamedTuple):
    """A value in a run file."""

    path: str
    """Dotted key."""
    value: Any
    kind: Any
    """What may be there: keys, a Kind, or None."""
    beside: Keys | None
    """Keys that are known beside it if its own is not, else None."""


def walk(tree: Any, kind: Any, path: str = "") -> Iterator[Place]:
    """Yield the values in a tree, and below them those whose keys are known.

    Args:
        tree: values at `path`, as a run file holds them.
        kind: what may be there.
        path: dotted key; empty at the top.
    """
    if path:
        yield Place(path, tree, kind, None)
    if isinstance(tree, list) and isinstance(kind, Kind):
        for index, value in enumerate(tree):
            yield from walk(value, kind, f"{path}[{index}]")
    keys = keys_of(kind, tree)
    if not isinstance(tree, dict) or keys is None:
        return
    for key, value in dict(tree).items():
        name = f"{path}.{key}" if path else str(key)
        if key in keys:
            yield from walk(value, keys[key], name)
        else:
            yield Place(name, value, None, keys)


def leaves(kind: Any, tree: Any, path: str = "") -> list[str]:
    """Return the dotted keys below a place that hold values and no further keys.

    Args:
        kind: what may be at the place.
        tree: values there; they say which class.
        path: its own dotted key; empty at the top.
    """
    keys = keys_of(kind, tree)
    if keys is None or (isinstance(kind, Kind) and kind.is_list):
        return [path]
    inner = tree if isinstance(tree, dict) else {}
    return [
        leaf
        for key, below in keys.items()
        if key != "dict_kwargs"
        for leaf in leaves(below, inner.get(key), f"{path}.{key}" if path else key)
    ]


def answer_unknown(name: str, keys: Keys, owned: dict[str, str], elsewhere: Sequence[str] = ()) -> str:
    """Return the message for an unknown key: where it is, and what was probably meant.

    Args:
        name: dotted key.
        keys: those known in its place.
        owned: dotted keys that exist elsewhere but not here, with what to use instead.
        elsewhere: dotted keys of the whole run file, for one that is known in another place.
    """
    if name in owned:
        return f"{name} is not set here: {owned[name]}"
    last = name.rpartition(".")[2]
    if same := [other for other in elsewhere if other.rpartition(".")[2] == last]:
        return f"unknown key {name}; did you mean {' or '.join(same[:2])}?"
    near = difflib.get_close_matches(last, keys, n=1, cutoff=0.6)
    return f"unknown key {name}; " + (f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(keys))}")


def keys_of(kind: Any, tree: Any) -> Keys | None:
    """Return the keys that a value may have, or None where any may be right (a free dictionary, unknown types).

    Args:
        kind: what is known of the value: keys, a Kind, or None.
        tree: the value; a `class_path` in it says which class.
    """
    if isinstance(kind, dict):
        return kind
    if isinstance(tree, dict) and isinstance(tree.get("class_path"), str):
        return {"class_path": None, "init_args": parameters(tree["class_path"]), "dict_kwargs": None}
    members = kind.members() if isinstance(kind, Kind) else []
    return next((fields for member in members if (fields := member.fields()) is not None), None)
