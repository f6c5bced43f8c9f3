"""Tasks of lm-evaluation-harness: found, loaded and looked through before a model is loaded.

A task that needs a package which is not installed, or a metric that nobody knows, would otherwise end an evaluation
when all of its work is done.
"""

import ast
import contextlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.manager import TaskDict

from modules.errors import UserError

WILDCARDS = "*?["
NAME = re.compile(rb"^(?:task|group|tag):[ \t]*[\"']?([\w.-]+)", re.MULTILINE)
"""Where a task file names what can be evaluated."""
PACKAGES = {"sklearn": "scikit-learn", "rouge_score": "rouge-score"}
"""Names to install, where they differ from those to import."""


def load_tasks(names: list[str], folder: Path | None, num_fewshot: int | None, seed: int) -> TaskDict:
    """Load tasks with their data, ready to be evaluated.

    Args:
        names: names of tasks, groups or tags; * and ? stand for any characters.
        folder: folder of the user's own tasks, looked through first; files that they name are relative to it.
        num_fewshot: solved examples before each question; a task that says 0 keeps 0. None: what each task says.
        seed: seed of the choice of examples.

    Raises:
        UserError: a task is unknown, cannot be loaded, or lacks what it needs.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"tasks_path: {folder} is not a folder; name the one that holds the tasks' YAML files")
    manager, found = _find(names, folder)
    with contextlib.chdir(folder or "."):
        try:
            loaded = manager.load(found)
        except ImportError as error:
            raise UserError(f"tasks: {_needs(', '.join(names), error.name or str(error))}") from error
        except Exception as error:  # of the harness, of datasets, or of a task's own code
            reason = str(error).strip().splitlines()
            raise UserError(
                f"tasks: {', '.join(names)} cannot be loaded ({type(error).__name__}: {reason[0] if reason else ''})"
            ) from error
    for name, task in loaded["tasks"].items():
        _check(name, task)
        if num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return loaded


def _find(names: list[str], folder: Path | None) -> tuple[TaskManager, list[str]]:
    """Return a manager that knows the names, and the names without wildcards.

    Parsing the harness's own 14,000 files takes many seconds: it is left out if the folder has all names, or if the
    files do not even mention one.
    """
    include = None if folder is None else str(folder.resolve())
    manager = TaskManager(include_path=include, include_defaults=False)
    missing = [name for name in names if not _matches(name, manager)]
    if missing:
        text = b"\n".join(file.read_bytes() for file in Path(lm_eval.tasks.__file__).parent.rglob("*.yaml"))
        for name in missing:
            if name.encode() not in text and not set(name) & set(WILDCARDS):
                known = [*manager.all_tasks, *{found.decode() for found in NAME.findall(text)}]
                raise _unknown(name, known, folder)
        manager = TaskManager(include_path=include)
    found: dict[str, None] = {}
    for name in names:
        if not (matches := _matches(name, manager)):
            raise _unknown(name, manager.all_tasks, folder)
        found |= dict.fromkeys(matches)
    return manager, list(found)


def _unknown(name: str, known: list[str], folder: Path | None) -> UserError:
    near = get_close_matches(name, known, n=3)
    mend = f"; did you mean {', '.join(near)}?" if near else ""
    if Path(name).is_file():
        parent = Path(name).parent
        mend = f"; a file of tasks is given by its folder, --tasks_path {parent}, and --tasks names the task in it"
    return UserError(f"tasks: there is no task, group or tag {name}{mend}{_broken(folder)}")


def _matches(name: str, manager: TaskManager) -> list[str]:
    known = manager.all_tasks
    return [name] if name in known else [other for other in known if fnmatch(other, name)]


def _broken(folder: Path | None) -> str:
    """Say which files of the folder cannot be read: the harness passes over them."""
    for file in sorted(folder.rglob("*.yaml")) if folder is not None else []:
        try:
            load_yaml(file, resolve_func=False, recursive=True)
        except Exception as error:
            return f"; {file} cannot be read ({' '.join(str(error).split())})"
    return ""


def _check(name: str, task: Task) -> None:
    """Check that nothing is missing that is needed only at the end."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"tasks: {name} runs code that the model writes; that is not supported here")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"tasks: {name} shows images or sounds; the model reads text only")
    for metric, function in getattr(task, "_metric_fn_list", {}).items():
        if function is None and task.get_config("process_results") is None:
            raise UserError(f"tasks: {name} has the metric {metric}, which is unknown (or in a package not installed)")
    for package in sorted({package for function in _functions(task) for package in _imports(function)}):
        if find_spec(package) is None:
            raise UserError(f"tasks: {_needs(name, package)}")


def _needs(name: str, package: str) -> str:
    return f"{name} needs a package that is not installed: .venv/bin/pip install {PACKAGES.get(package, package)}"


def _functions(task: Task) -> Iterator[Callable[..., Any]]:
    """Yield what a task calls when the model has answered."""
    for table in ("_metric_fn_list", "_aggregation_list"):
        yield from filter(inspect.isfunction, getattr(task, table, {}).values())
    if inspect.isfunction(function := task.get_config("process_results")):
        yield function


def _imports(function: Callable[..., Any]) -> Iterator[str]:
    """Yield the top-level packages that a function imports when it is called."""
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
