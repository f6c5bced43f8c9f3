"""Instruction pairs from the docstrings of the Python standard library: text that every installation has.

The sources are parsed, never imported. Of each public function, class and method: what it does, which one does that,
and how it is called.
"""

import ast
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from modules.batch import Message

_LONGEST = 160
"""Characters of an answer; longer ones are left out: the pairs are for small models."""
_LEFT_OUT = ("encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "turtledemo")
"""Folders without an interface that anybody asks about."""


def docstring_conversations(root: str | Path | None = None) -> Iterator[list[Message]]:
    """Yield conversations of one question and one answer, in an order that depends on the sources alone.

    No question comes twice, and none has two answers: what a name means in several ways is left out.

    Args:
        root: the folder of the sources; None: this Python's standard library.
    """
    definitions = list(_definitions(Path(root or sysconfig.get_paths()["stdlib"])))
    names = Counter(name for name, _, _ in definitions)
    summaries = Counter(summary for _, _, summary in definitions)
    for name, call, summary in definitions:
        if names[name] > 1:
            continue
        yield _pair(f"What does {name} do?", summary)
        if summaries[summary] == 1:
            yield _pair(f"What in the standard library does this: {summary}", name)
        if call is not None:
            yield _pair(f"How is {name} called?", call)


def _pair(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _definitions(root: Path) -> Iterator[tuple[str, str | None, str]]:
    """Yield (name with its module, how it is called or None for a class, first sentence of its docstring)."""
    for file in _modules(root):
        module = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(file.read_bytes())
        for name, node in _public(tree, module):
            summary = _summary(ast.get_docstring(node))
            if summary is None:
                continue
            call = None if isinstance(node, ast.ClassDef) else f"{name}({ast.unparse(node.args)})"
            yield name, call if call is not None and len(call) <= _LONGEST else None, summary


def _modules(root: Path) -> Iterator[Path]:
    """Yield the files of public modules, sorted by name."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name.isidentifier() and not _hidden(name))
        for name in sorted(files):
            stem, suffix = os.path.splitext(name)
            if suffix == ".py" and stem.isidentifier() and (stem == "__init__" or not _hidden(stem)):
                yield Path(folder, name)


def _hidden(name: str) -> bool:
    return name.startswith("_") or name in _LEFT_OUT


def _public(
    node: ast.Module | ast.ClassDef, prefix: str
) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield the public definitions in a module and, after each class, in it."""
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            name = f"{prefix}.{child.name}"
            yield name, child
            if isinstance(child, ast.ClassDef):
                yield from _public(child, name)


def _summary(docstring: str | None) -> str | None:
    """Return the first sentence of a docstring in one line; None where it is no sentence of its own."""
    paragraph = " ".join((docstring or "").split("\n\n")[0].split())
    found = re.match(r"[A-Z].*?[^\s.]\.(?= [A-Z]|$)", paragraph)
    return found[0] if found and paragraph.isascii() and len(found[0]) <= _LONGEST else None
