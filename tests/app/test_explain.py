"""jsonargparse's nested messages come down to the key and the reason."""

import pytest

from app.explain import Refusal, explain

UNION = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'lightning.pytorch.core.module.LightningModule'>, <class 'NoneType'>]
  Errors:
{errors}
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: {{'class_path': 'a.B', 'init_args': {{'width': 'three'}}}}"""


def union(*lines: str) -> str:
    return UNION.format(errors="\n".join("    " + line for line in lines))


@pytest.mark.parametrize(
    ("message", "refusal"),
    [
        (
            "Parser key \"trainer.max_steps\":\n  Expected a <class 'int'>. Got value: abc",
            Refusal("trainer.max_steps", "expected int, got abc"),
        ),
        (
            union(
                "- Problem with given class_path 'a.B':",
                '    Parser key "width":',
                "      Expected a <class 'int'>. Got value: three",
            ),
            Refusal("model.init_args.width", "expected int, got three"),
        ),
        (
            union("- Problem with given class_path 'a.B':", "    No module named 'a'"),
            Refusal("model", "class_path a.B: No module named 'a'"),
        ),
        (
            union("- Import path a.B does not correspond to a subclass of LightningModule"),
            Refusal("model", "class_path a.B is no LightningModule"),
        ),
        (
            union("- Problem with given class_path 'a.B':", "    Option 'widht' is not accepted"),
            Refusal("model.init_args.widht", "", unknown=True),
        ),
        (
            union("- Problem with given class_path 'a.B':", "    Group 'c' does not accept option 'd'"),
            Refusal("model.init_args.c.d", "", unknown=True),
        ),
        (
            union("- Problem with given class_path 'a.B':", "    the following arguments are required: c.d, e"),
            Refusal("model.init_args", "missing key model.init_args.c.d, model.init_args.e"),
        ),
        (
            union("- Expected a dot import path string: foo"),
            Refusal("model", "expected a class path like package.module.Class, got foo"),
        ),
        (
            union(
                "- Problem with given class_path 'a.B':",
                '    Parser key "backbone":',
                "    Unable to load config 'x.yaml'",
                '      - Parser key "backbone": Unable to load config "x.yaml"',
            ),
            Refusal("model.init_args.backbone", "x.yaml is not there or no YAML file"),
        ),
        (
            union("- Problem with given class_path 'a.B':", "    unrecognized arguments: --c.dd=1"),
            Refusal("model.init_args.c.dd", "", unknown=True),
        ),
        ("something new", Refusal("", "something new")),
    ],
)
def test_the_innermost_reason_is_found(message, refusal):
    assert explain(message) == refusal


def test_a_union_that_nothing_fits_says_what_was_expected():
    message = """Parser key "trainer.limit":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'int'>, typing.Literal['a', 'b'], <class 'NoneType'>]
  Errors:
    - Expected a <class 'int'>
    - Expected a typing.Literal['a', 'b']
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: many"""
    assert explain(message) == Refusal("trainer.limit", "expected int or one of a, b or null, got many")
