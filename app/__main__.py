"""The program: `python -m app COMMAND ...`.

It starts fast: what a command needs is imported when the command is called, and `--help` reads the first line of each
command's documentation without importing it. What can be wrong with a command line is found before the imports that
take seconds. Down to the check of the environment this file is read by older Pythons, too.
"""

import ast
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from app import environment

environment.check()  # before the annotations below, which older Pythons refuse
from callbacks.stop_request import STOP  # noqa: E402

TRAINING = {
    "fit": "train a model, or go on with a run",
    "validate": "print the validation metrics of a run's newest checkpoint",
    "test": "print the test metrics of a run's newest checkpoint",
}
COMMANDS = Path(__file__).parent / "commands"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of the C library's `mallopt` (malloc.h): bytes from which memory goes back to, or comes from, the system."""


def main(args: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 defect, 2 user's mistake, 130 interrupted.

    Args:
        args: command line after the program's name; that of the process unless given.
    """
    given = list(sys.argv[1:] if args is None else args)
    if given and given[0] in TRAINING:
        STOP.listen()
    settle_process()
    try:
        code = dispatch(given)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return interrupted()
    except BrokenPipeError:
        drop_output()
        return 1
    except Exception as error:
        from app.errors import mistake

        message = mistake(error)
        if message is None:
            raise
        rank = os.environ.get("LOCAL_RANK", "0")
        where = "" if rank == "0" else f" (process {rank})"
        print(f"error{where}: {environment.as_started(message)}", file=sys.stderr, flush=True)
        if isinstance(error, OSError) and error.filename is None:
            drop_output()
        return 2


def drop_output() -> None:
    """Write what is left for stdout nowhere: it cannot be written, and Python would complain once more at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def settle_process() -> None:
    """Set what a process that computes on a CPU should have from its start: before torch is imported.

    Threads that spin while they wait for each other bring a run on shared cores to a tenth of its speed; on idle cores
    sleeping costs next to nothing. And a step frees and asks for the same large blocks again and again: the C library
    would return them to the system each time, which hands them out again page by page, zeroed. Keeping them, in large
    pages, saves 5 to 10% of a step's time.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's allocator asks for large pages
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for most in (2**31 - 1, 32 * 2**20):  # older C libraries refuse more than 32 MiB
            if mallopt(M_MMAP_THRESHOLD, most):
                mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
                break


def dispatch(args: list[str]) -> int:
    """Call the command that the first argument names.

    Raises:
        UserError: there is no such command, or its command line is wrong.
    """
    others = commands()
    if args[:1] == ["help"] and args[1:]:
        args = [args[1], "--help"]
    if not args or args[0] in ("-h", "--help", "help"):
        print(environment.as_started(usage(others)))
        return 0 if args else 2
    command, rest = args[0], args[1:]
    if command in ("-V", "--version", "version"):
        print(version())
    elif command in TRAINING:
        train(command, rest)
    elif command == "completion":
        from app.completion import complete

        complete(rest)
    elif command in others:
        from app.command_line import call

        return call(command, rest)
    else:
        from difflib import get_close_matches

        from modules.errors import UserError

        near = get_close_matches(command, [*TRAINING, *others], n=1)
        mend = f"did you mean {near[0]}?" if near else "see python -m app --help"
        raise UserError(f"no command {command}; {mend}")
    return 0


def train(command: str, args: list[str]) -> None:
    """Check the command line of a run, say what is about to happen, and import what carries it out."""
    from app.run_keys import check_files, check_run, run_of, wants_text

    given = check_run(args, command)
    if not wants_text(args):
        check_files(given)
        if "LOCAL_RANK" not in os.environ:
            print(f"{command} {' + '.join(given.files)} ({run_of(given)}): loading ...", file=sys.stderr, flush=True)
    from app.cli import RunCLI

    RunCLI(args, command).run()


def version() -> str:
    """Return the versions that a report of a defect should name."""
    from importlib.metadata import version as of

    python = ".".join(map(str, sys.version_info[:3]))
    return f"superbolt {of('superbolt')} (torch {of('torch')}, lightning {of('lightning')}, Python {python})"


def commands() -> dict[str, str]:
    """Return the commands of app/commands with the first line of their documentation."""
    found = {}
    for file in sorted(COMMANDS.glob("[a-z]*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == file.stem:
                found[file.stem] = (ast.get_docstring(node) or "").partition("\n")[0].rstrip(".")
    return found


def usage(others: dict[str, str]) -> str:
    """Return the text of `--help`."""
    listed = {**TRAINING, **{name: text[:1].lower() + text[1:] for name, text in others.items()}}
    listed |= {
        "completion": "print what makes a shell complete commands, options and keys",
        "help": "explain a command: help COMMAND",
        "version": "print the versions of the program, torch, Lightning and Python",
    }
    width = max(map(len, listed))
    lines = [f"  {name:<{width}}  {text}" for name, text in listed.items()]
    return "\n".join(
        [
            "usage: python -m app COMMAND ...   (or: superbolt COMMAND ...)",
            "",
            "Train models of the Nemotron 3 Super kind, on a laptop or on a cluster.",
            "",
            *lines,
            "",
            "python -m app COMMAND --help explains a command.",
            "python -m app fit --config configs/pretrain.yaml trains the small model.",
        ]
    )


def interrupted() -> int:
    """Say that the program was interrupted."""
    print("interrupted; the same command goes on from what is on the disk, or starts anew", file=sys.stderr, flush=True)
    return 130


if __name__ == "__main__":
    sys.exit(main())
