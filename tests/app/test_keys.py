"""Unknown keys are named in full, with the nearest known one; known ones are explained."""

import re
import typing
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from pkgutil import resolve_name

import docstring_parser
import pytest

from app.keys import answer_unknown, keys_of, walk
from app.run_keys import CALLBACKS
from app.signatures import parameters
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


PATH = f"{__name__}.Derived"
KEYS = {"name": None, "model": None, "outer": parameters(f"{__name__}.Outer")}
OWNED = {"outer.old": "use width"}


def answers(tree) -> list[str]:
    return [answer_unknown(place.path, place.beside, OWNED) for place in walk(tree, KEYS) if place.beside is not None]


@pytest.mark.parametrize(
    "tree",
    [
        {"name": "x"},
        {"outer": {"width": 1, "inner": {"depth": 2}, "several": [{"depth": 1}], "free": {"anything": 1}}},
        {"outer": {"inner": "a/file.yaml"}},
        {"outer": None},
        {"model": {"class_path": "nowhere.Model", "init_args": {"anything": 1}}},
    ],
)
def test_known_keys_pass(tree):
    assert answers(tree) == []


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"nmae": 1}, "unknown key nmae; did you mean name?"),
        ({"outer": {"widht": 1}}, "unknown key outer.widht; did you mean width?"),
        ({"outer": {"inner": {"dept": 1}}}, "unknown key outer.inner.dept; did you mean depth?"),
        ({"outer": {"several": [{"depth": 1}, {"x": 1}]}}, "unknown key outer.several[1].x; known here: depth"),
        ({"outer": {"old": 1}}, "outer.old is not set here: use width"),
        (
            {"model": {"class_path": PATH, "init_args": {"widht": 1}}},
            "unknown key model.init_args.widht; did you mean width?",
        ),
    ],
)
def test_unknown_keys_are_named(tree, message):
    assert answers(tree) == [message]


def test_keys_behind_a_class_path_include_those_passed_on():
    keys = parameters(PATH)
    assert keys is not None
    assert set(keys) == {"own", "width", "inner", "several", "free"}


def test_what_cannot_be_read_is_left_to_the_parser():
    assert keys_of(None, {"class_path": "nowhere.Model"})["init_args"] is None
    assert parameters("math.sqrt") is None
    assert parameters("lightning.pytorch.loggers.WandbLogger") is None  # keywords go to wandb


def test_without_a_near_key_all_are_listed():
    assert answer_unknown("a.zzz", {"one": None, "two": None}, {}) == "unknown key a.zzz; known here: one, two"


@pytest.mark.parametrize(
    "path",
    [
        *CALLBACKS.values(),
        "lightning.pytorch.Trainer",
        "lightning.pytorch.callbacks.EarlyStopping",
        "lightning.pytorch.loggers.CSVLogger",
        "modules.pretraining.Pretraining",
        "modules.backbone.config.BackboneConfig",
        "datamodules.pretraining.PretrainingData",
        "app.strategies.ShardedStrategy",
        "tests.app.standin.Model",
    ],
)
def test_the_source_says_what_the_parser_finds_by_importing(path: str):
    from jsonargparse import ArgumentParser

    names = ArgumentParser().add_class_arguments(resolve_name(path), fail_untyped=False)
    read = parameters(path)
    assert read is not None
    assert sorted(read) == sorted(names)


def members(hint) -> list:
    """Return a type, and the types within it."""
    return [hint, *(inner for item in typing.get_args(hint) for inner in members(item))]


def unexplained(kind: type, seen: set[type]) -> list[str]:
    """Return the keys of a class, and of the dataclasses it takes, that no documentation explains."""
    keys = parameters(f"{kind.__module__}.{kind.__name__}")
    assert keys is not None
    seen.add(kind)
    documented = [docstring_parser.parse_from_object(base).params for base in kind.__mro__[:-1]]
    explained = {parameter.arg_name for parameters in documented for parameter in parameters if parameter.description}
    found = [f"{kind.__name__}.{key}" for key in keys if key not in explained]
    hints = [hint for base in kind.__mro__ for hint in typing.get_type_hints(base.__init__).values()]
    for inner in (inner for hint in hints for inner in members(hint)):
        if is_dataclass(inner) and inner not in seen:
            found += unexplained(inner, seen)
    return found


def test_every_key_of_a_run_file_is_explained():
    texts = [file.read_text(encoding="utf-8") for file in (ROOT / "configs").rglob("*.yaml")]
    paths = {path for text in texts for path in re.findall(r"class_path: (\S+)\.(\w+)", text)}
    kinds = [*(getattr(import_module(module), name) for module, name in paths), *map(resolve_name, CALLBACKS.values())]
    seen: set[type] = set()
    assert [key for kind in kinds for key in unexplained(kind, seen)] == []
    assert {"Pretraining", "BackboneConfig", "SpikeGuardConfig", "Phase"} <= {kind.__name__ for kind in seen}


def test_an_unexplained_key_is_found():
    assert unexplained(Inner, set()) == ["Inner.depth"]
    assert "Inner.depth" in unexplained(Outer, set())
