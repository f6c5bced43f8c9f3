"""A process that has imported the program once and forks a child per command: starting Python anew costs seconds.

Reads one JSON line per command: {"args": [...], "output": file, "environment": {...}, "folder": where}; answers with
the child's process number, then, when the child has ended, with its exit code (negative: killed by that signal).
"""

import json
import os
import sys
import traceback

import torch.utils.tensorboard  # noqa: F401

import app.cli  # noqa: F401
import tests.app.standin  # noqa: F401


def child(command: dict) -> int:
    os.environ.update(command["environment"])
    os.chdir(command["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what this process reads are commands
    descriptor = os.open(command["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for target in (1, 2):
        os.dup2(descriptor, target)
    sys.argv = ["app", *command["args"]]
    from app.__main__ import main

    try:
        return main()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


def serve() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = child(json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
