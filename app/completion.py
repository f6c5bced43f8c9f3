"""Completion for shells: commands, options and keys, from the source alone, so that a Tab costs a tenth of a second.

The shell's function calls `completion words WORD...` with the words after the program's name, the last one unfinished.
"""

from typing import Any

from app.keys import leaves
from app.run_keys import RunArguments, run_keys, stages
from app.signatures import parameters
from modules.errors import UserError

BASH = """\
_superbolt() {
    local words=("${COMP_WORDS[@]:1:COMP_CWORD}") program=("${COMP_WORDS[0]}")
    if [[ ${COMP_WORDS[0]} == *python* ]]; then
        [[ ${COMP_WORDS[1]} == -m && ${COMP_WORDS[2]} == app ]] || return
        program+=(-m app)
        words=("${COMP_WORDS[@]:3:COMP_CWORD-2}")
    fi
    COMPREPLY=($("${program[@]}" completion words "${words[@]}" 2>/dev/null))
}
complete -o default -F _superbolt superbolt python .venv/bin/python
"""
SHELLS = {"bash": BASH, "zsh": "autoload -U +X bashcompinit && bashcompinit\n" + BASH}


def complete(args: list[str]) -> None:
    """Print the script of a shell (`bash`, `zsh`), or what completes `words WORD...`.

    Raises:
        UserError: it is another shell.
    """
    if args[:1] == ["words"]:
        print("\n".join(candidates(args[1:])))
    elif args[:1] and args[0] in SHELLS:
        print(SHELLS[args[0]], end="")
    else:
        raise UserError("completion: name the shell, bash or zsh; for example source <(python -m app completion bash)")


def candidates(words: list[str]) -> list[str]:
    """Return what may stand for the last of some words; none where the shell should offer files."""
    from app.__main__ import TRAINING, commands

    *before, last = words or [""]
    others = commands()
    if not before:
        found = [*TRAINING, *others, "completion", "help", "version"]
    elif before[0] == "help":
        found = [*TRAINING, *others]
    elif not last.startswith("-"):
        found = values(before)
    else:
        options = parameters(f"app.commands.{before[0]}.{before[0]}") or {}
        found = [f"--{name}" for name, kind in options.items() if kind.is_option]
        if before[0] in TRAINING or before[0] in ("plan", "inspect"):
            found += ["--config", *(f"--{key}" for key in leaves(run_keys(), tree_of(before[1:])))]
        found += ["--help"]
    return sorted(word for word in found if word.startswith(last))


def values(before: list[str]) -> list[str]:
    """Return the values of the option that stands last, where its type lists them."""
    kind = (parameters(f"app.commands.{before[0]}.{before[0]}") or {}).get(before[-1].removeprefix("--"))
    return kind.choices() if kind is not None and before[-1].startswith("--") else []


def tree_of(args: list[str]) -> dict[str, Any]:
    """Return what a command line says so far, with the first stage where it names none."""
    try:
        tree = RunArguments(args, "fit").tree
    except UserError:
        tree = {}
    for key in ("model", "data"):
        tree.setdefault(key, {"class_path": stages(key)[0]})
    return tree
