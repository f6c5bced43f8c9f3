"""Unknown keys are named in full, with the nearest known one; known ones are explained."""

import re
from dataclasses import dataclass, is_dataclass
from importlib import import_module

import docstring_parser
import pytest

from app.cli import CALLBACKS
from app.keys import _arguments, check_keys, find, keys_of, parameters_of, unknown_key
from modules.errors import UserError
from tests.app.helpers import ROOT


@dataclass(frozen=True, kw_only=True)
class Inner:
    """What lies inside."""

    depth: int = 1


class Outer:
    def __init__(
        self, width: int, inner: Inner, several: list[Inner] | None = None, free: dict[str, int] | None = None
    ):
        pass


class Derived(Outer):
    def __init__(self, own: int = 0, **others):
        super().__init__(**others)


KEYS = {"name": str, "model": object, "outer": parameters_of(Outer)}
PATH = f"{__name__}.Derived"


def check(tree):
    check_keys(tree, KEYS, "file", "", {"outer.old": "use width"})


@pytest.mark.parametrize(
    "tree",
    [
        {"name": "x"},
        {"outer": {"width": 1, "inner": {"depth": 2}, "several": [{"depth": 1}], "free": {"anything": 1}}},
        {"outer": {"inner": "a/file.yaml"}},
        {"outer": None},
    ],
)
def test_known_keys_pass(tree):
    check(tree)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"nmae": 1}, "file: unknown key nmae; did you mean name?"),
        ({"outer": {"widht": 1}}, "file: unknown key outer.widht; did you mean width?"),
        ({"outer": {"inner": {"dept": 1}}}, "file: unknown key outer.inner.dept; did you mean depth?"),
        ({"outer": {"several": [{"depth": 1}, {"x": 1}]}}, "file: unknown key outer.several[1].x; known here: depth"),
        ({"outer": {"old": 1}}, "file: outer.old is not set here: use width"),
    ],
)
def test_unknown_keys_are_named(tree, message):
    with pytest.raises(UserError) as caught:
        check(tree)
    assert str(caught.value) == message


def test_a_list_where_keys_belong_is_named():
    with pytest.raises(UserError, match=r"^file: outer\.inner is a list; it holds keys: depth$"):
        check({"outer": {"inner": [{"depth": 1}]}})


def test_keys_behind_a_class_path_include_those_passed_on():
    keys = parameters_of(Derived)
    assert keys is not None
    assert set(keys) == {"own", "width", "inner", "several", "free"}


def test_a_class_of_another_kind_is_left_to_the_parser():
    assert keys_of(dict, {"class_path": "tests.app.standin.Model"}) is None


def test_find_walks_down_the_types():
    assert find(KEYS, {}, ["outer", "inner"]) == {"depth": int}
    assert find(KEYS, {}, ["outer", "nothing"]) is None


def test_without_a_near_key_all_are_listed():
    assert unknown_key("a.zzz", {"one": int, "two": int}, {}) == "unknown key a.zzz; known here: one, two"


def unexplained(kind: type, seen: set[type]) -> list[str]:
    """Return the keys of a class, and of the dataclasses it takes, that no documentation explains."""
    keys = parameters_of(kind)
    assert keys is not None
    seen.add(kind)
    documented = [docstring_parser.parse_from_object(base).params for base in kind.__mro__[:-1]]
    explained = {parameter.arg_name for parameters in documented for parameter in parameters if parameter.description}
    found = [f"{kind.__name__}.{key}" for key in keys if key not in explained]
    for hint in keys.values():
        for inner in (hint, *_arguments(hint)):
            if isinstance(inner, type) and is_dataclass(inner) and inner not in seen:
                found += unexplained(inner, seen)
    return found


def test_every_key_of_a_run_file_is_explained():
    texts = [file.read_text(encoding="utf-8") for file in (ROOT / "configs").rglob("*.yaml")]
    paths = {path for text in texts for path in re.findall(r"class_path: (\S+)\.(\w+)", text)}
    kinds = [*(getattr(import_module(module), name) for module, name in paths), *CALLBACKS.values()]
    seen: set[type] = set()
    assert [key for kind in kinds for key in unexplained(kind, seen)] == []
    assert {"Pretraining", "BackboneConfig", "SpikeGuardConfig", "Phase"} <= {kind.__name__ for kind in seen}


def test_an_unexplained_key_is_found():
    assert unexplained(Inner, set()) == ["Inner.depth"]
    assert "Inner.depth" in unexplained(Outer, set())
