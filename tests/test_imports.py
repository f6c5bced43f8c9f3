"""Imports run one way: app -> callbacks -> modules, app -> datamodules -> modules/batch.py, and down in modules/."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("app", "callbacks", "datamodules", "modules")
FILES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]

BELOW_BACKBONE = ("modules.precision", "modules.ops", "modules.batch", "modules.errors")
BELOW_OBJECTIVES = ("modules.checkpoints", "modules.backbone", *BELOW_BACKBONE)
TIERS = {
    "modules.batch": (),
    "modules.errors": (),
    "modules.ops": ("modules.batch", "modules.errors"),
    "modules.precision": ("modules.ops", "modules.batch", "modules.errors"),
    "modules.backbone": BELOW_BACKBONE,
    "modules.checkpoints": ("modules.backbone", *BELOW_BACKBONE),
    "modules.objectives": BELOW_OBJECTIVES,
    "modules.generation": BELOW_OBJECTIVES,
    "modules.optim": BELOW_OBJECTIVES,
    "modules.ptq": ("modules.objectives", *BELOW_OBJECTIVES),
    "modules": ("modules",),  # the LightningModules, directly under modules/
    "datamodules": ("modules.batch", "modules.errors"),
    "callbacks": ("modules",),
    "app": ("callbacks", "datamodules", "modules"),
}
"""What each part may import beside itself; a file belongs to the longest name that fits it."""

OUTSIDE = {
    "modules.batch": ("lightning", "litdata", "transformers"),
    "modules.ops": ("lightning", "litdata", "transformers"),
    "modules.precision": ("lightning", "litdata", "transformers"),
    "modules.backbone": ("lightning", "litdata", "transformers"),
    "modules.objectives": ("lightning", "litdata"),
    "modules.ptq": ("lightning", "litdata", "transformers"),
}
"""Other people's packages that a part must not know."""

OPTIONAL = ("causal_conv1d", "mamba_ssm", "torchao", "transformer_engine", "triton", "vllm")
"""Packages that need not be installed: never imported when a file of ours is loaded."""

LATE = ("boto3", "datasets", "obstore", "pyarrow")
"""Packages that few runs need and that take up to a second: imported in the functions that use them."""

HEAVY = ("jsonargparse", "lightning", "litdata", "numpy", "torch", "transformers", "yaml")
"""Packages that make a program start slowly."""


def within(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part_of(name: str) -> str:
    return max((part for part in TIERS if within(name, part)), key=len)


def imported(nodes: Iterator[ast.AST], name: str) -> Iterator[str]:
    """Yield the full dotted names that import statements among the nodes load."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, node.module] if node.module else package)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def at_load(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the nodes that run when the file is loaded: everything outside functions and TYPE_CHECKING."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        yield node
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if not lazy and not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            todo += ast.iter_child_nodes(node)


def violations(name: str, tree: ast.Module) -> list[str]:
    """Return one line per import of the file that a rule forbids."""
    part = part_of(name)
    allowed = (part, *TIERS[part])
    found = []
    for target in imported(ast.walk(tree), name):
        ours = target.split(".")[0] in (*PACKAGES, "benchmarks", "tests")
        if ours and not any(within(target, other) for other in allowed):
            found.append(f"{name} imports {target}, but {part} may import only {', '.join(allowed)}")
        if any(within(target, other) for other in OUTSIDE.get(part, ())):
            found.append(f"{name} imports {target}, which {part} must not know")
    for target in imported(at_load(tree), name):
        if any(within(target, other) for other in OPTIONAL):
            found.append(f"{name} imports the optional {target} when it is loaded")
        if any(within(target, other) for other in LATE):
            found.append(f"{name} imports the slow {target} when it is loaded")
        if name == "app.__main__" and any(within(target, other) for other in HEAVY):
            found.append(f"{name} imports {target} when it is loaded: every command would start slowly")
    return found


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_run_one_way(file: Path):
    assert violations(module_name(file), ast.parse(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("modules.ops.ssd", "from modules.backbone.config import BackboneConfig"),
        ("modules.backbone.model", "import lightning.pytorch as L"),
        ("modules.backbone.mamba", "from ..objectives import next_token"),
        ("modules.precision.recipe", "def f():\n    from modules.optim import adamw"),
        ("modules.ops.kernels", "import mamba_ssm"),
        ("modules.pretraining", "from app.strategies import sharded"),
        ("datamodules.text.corpus", "from modules.backbone import config"),
        ("callbacks.samples", "from datamodules.tokenizer import load"),
        ("datamodules.text.tables", "import pyarrow.parquet as pq"),
        ("app.__main__", "from torch import nn"),
    ],
)
def test_a_wrong_import_is_found(name: str, source: str):
    assert len(violations(name, ast.parse(source))) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("modules.ops.kernels", "def f():\n    import mamba_ssm"),
        ("datamodules.text.corpus", "from modules.batch import PackedBatch"),
        ("app.cli", "import torch\nfrom callbacks.samples import Samples"),
        ("app.__main__", "def main():\n    import torch"),
    ],
)
def test_a_right_import_is_left_alone(name: str, source: str):
    assert violations(name, ast.parse(source)) == []


def test_packages_are_listed_in_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(
        {".".join(file.relative_to(ROOT).parent.parts) for file in FILES}
    )
