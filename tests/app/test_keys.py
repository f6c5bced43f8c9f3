"""Unknown keys are named in full, with the nearest known one."""

from dataclasses import dataclass

import pytest

from app.keys import check_keys, find, keys_of, parameters_of, unknown_key
from modules.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Inner:
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
