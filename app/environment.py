"""The Python that the program runs in: whether it is the project's, and how to start it again from the same shell."""

import os
import shlex
import shutil
import sys
from importlib.util import find_spec

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NEEDED = ("torch", "lightning", "jsonargparse", "litdata", "transformers", "tokenizers", "tensorboard", "yaml")
"""Some of the packages that `make` installs."""


def check() -> None:
    """End the program with exit code 2 and one line unless it runs in the project's environment."""
    what = problem()
    if what:
        print(f"error: {what}", file=sys.stderr)
        sys.exit(2)


def problem() -> str:
    """Return what is wrong with this Python, and the mend; empty if nothing is. Older Pythons run this, too."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    version = "{}.{}".format(*sys.version_info[:2])
    if version not in ("3.11", "3.12"):
        what = f"{sys.executable} is Python {version}, and Python 3.11 or 3.12 is needed"
    elif missing:
        what = f"{sys.executable} has no {missing[0]}: it is not the project's environment"
    else:
        return ""
    folder = os.path.relpath(os.path.join(ROOT, ".venv"))
    if not os.path.exists(os.path.join(ROOT, ".venv", ".ready")):
        return f"{what}; run `make setup` in {ROOT}, then `source {folder}/bin/activate`, then the same command"
    return f"{what}; run `source {folder}/bin/activate`, then the same command"


def command(module: str = "app") -> str:
    """Return how to start a module of the program from the shell that started this process, quoted for it."""
    script = sys.argv[0]
    if os.path.basename(script) == "superbolt":
        if module == "app":
            return "superbolt" if shutil.which("superbolt") == script else shlex.quote(script)
        return f"{shlex.quote(os.path.join(os.path.dirname(script), 'python'))} -m {module}"
    ours = os.path.dirname(os.path.abspath(script)) == os.path.join(ROOT, "app")
    return f"{shlex.quote(sys.orig_argv[0]) if ours else 'python'} -m {module}"


def as_started(text: str) -> str:
    """Return a text for people with the commands in it as this process was started."""
    return text.replace("python -m app ", command() + " ")
