"""The folder of a run: what is in it, whether it is finished, and where the same command goes on.

runs/<name>/config.yaml                      the resolved configuration of the newest start
runs/<name>/checkpoints/step=00000123/       see modules/checkpoints/folder.py
runs/<name>/checkpoints/best                 link to the best of them, where checkpoint.keep_best asks for it
runs/<name>/set_aside/1/step=00000123/       checkpoints that a start from an earlier step left behind
runs/<name>/lock                             locked by the process that trains; says which one that is
runs/<name>/spikes/step=00000123.pt          see callbacks/skipped_batches.py
runs/<name>/events.out.tfevents.*            TensorBoard
"""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from app.run_keys import check_name
from modules.checkpoints import folder
from modules.errors import UserError, writing

ROOT = Path("runs")
"""Where runs lie unless trainer.default_root_dir says otherwise."""
LOCK = "lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
LOCK_TRIES, LOCK_PAUSE = 10, 0.1
"""How often, and after how many seconds, a lock is tried again: `runs` holds it for a moment, to see whether it can."""
SET_ASIDE = "set_aside"
SHOWN = 20
"""Differences that are printed."""


class RunFolder:
    """A run's folder on the disk.

    Args:
        root: folder that holds all runs (`trainer.default_root_dir`).
        name: name of the run.

    Raises:
        UserError: the name is no plain folder name.
    """

    def __init__(self, root: Path, name: str) -> None:
        check_name(name)
        self.path = root / name
        self.name = name
        self._lock: int | None = None
        self._made: list[Path] = []

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / folder.CHECKPOINTS

    def clean(self) -> None:
        """Delete what an interrupted save left behind."""
        folder.clean(self.checkpoints)

    def newest(self) -> tuple[Path | None, list[str]]:
        """Return the newest complete checkpoint, and a line for each damaged one that was passed over.

        Raises:
            UserError: there are checkpoints, but all are damaged.
        """
        path, damaged = folder.newest(self.checkpoints)
        if path is None and damaged:
            raise UserError(
                f"every checkpoint in {self.checkpoints} is damaged ({damaged[0][1]}). "
                f"Delete {self.path} to start anew, or give the run another --name"
            )
        return path, [f"{other} is damaged and passed over: {problem}" for other, problem in damaged]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training this run; the lock ends with the process, however that ends.

        Where nothing but the lock was written by the end of the block, nothing is left: a rejected configuration leaves
        no folder.

        Raises:
            UserError: another process trains the run.
        """
        for place in (self.path, self.path.parent):
            if place.is_file():
                raise UserError(f"{place} is a file where the run's folder would be; move it, or give another --name")
        for attempt in range(LOCK_TRIES):
            if attempt:
                time.sleep(LOCK_PAUSE)
            self._made = [self.path, *(place for place in self.path.parents if not place.exists())]
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = _lock(self.path / LOCK, os.O_RDWR | os.O_CREAT)
            except (FileNotFoundError, FileExistsError):  # a start that was refused removes the folder meanwhile
                if attempt == LOCK_TRIES - 1:
                    raise
            if self._lock is not None:
                break
        else:
            raise UserError(
                f"run {self.name} ({self.path}) is being trained by {self.holder()}; wait for it, stop it (Ctrl-C or "
                "SIGTERM saves), or give another --name"
            )
        try:
            self._say_holder()
            yield
        finally:
            self.release()

    def release(self) -> None:
        """Give the lock up; where nothing but the lock was written, leave nothing."""
        if self._lock is None:
            return
        if list(self.path.iterdir()) == [self.path / LOCK]:
            (self.path / LOCK).unlink()
            with suppress(OSError):  # another start fills it meanwhile
                for path in self._made:
                    path.rmdir()
        os.close(self._lock)
        self._lock = None

    def _say_holder(self) -> None:
        assert self._lock is not None
        text = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        with writing(self.path / LOCK):
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, text.encode(), 0)

    def holder(self) -> str:
        """Return who says to hold the lock."""
        with suppress(FileNotFoundError):  # it has just been given up
            return (self.path / LOCK).read_text(encoding="utf-8").strip() or "another process"
        return "another process"

    @property
    def is_locked(self) -> bool:
        """Whether another process trains the run."""
        try:
            file = _lock(self.path / LOCK, os.O_RDONLY)
        except FileNotFoundError:
            return False
        if file is not None:
            os.close(file)
        return file is None

    def set_aside_after(self, step: int) -> Path | None:
        """Move the checkpoints after a step out of the way, and return where they are now; None: there are none."""
        later = [path for path in folder.checkpoints(self.checkpoints) if folder.step_of(path) > step]
        if not later:
            return None
        place = self.path / SET_ASIDE
        target = place / str(1 + max((int(path.name) for path in place.glob("[0-9]*")), default=0))
        target.mkdir(parents=True)
        for path in later:
            path.rename(target / path.name)
        best = self.checkpoints / folder.BEST
        if not best.exists():  # a link to one of them
            best.unlink(missing_ok=True)
        return target

    def save_config(self, text: str) -> None:
        """Write the resolved configuration; it replaces that of an earlier start in one step."""
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.path / (folder.RUN_CONFIG + folder.PARTIAL)
        try:
            with writing(self.path / folder.RUN_CONFIG):
                partial.write_text(text, encoding="utf-8")
                folder.sync(partial)
                partial.rename(self.path / folder.RUN_CONFIG)
        finally:
            partial.unlink(missing_ok=True)


def _lock(file: Path, flags: int) -> int | None:
    """Lock a file, shared where it is opened for reading; return its descriptor, or None if another process holds it.

    It is a lock of the process: a loader's worker, forked from it, does not keep it. To open and close the file once
    more would give it up.
    """
    descriptor = os.open(file, flags, 0o644)
    try:
        fcntl.lockf(descriptor, (fcntl.LOCK_EX if flags & os.O_RDWR else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"warning: {file}: this file system has no locks; start no second process with this run", flush=True)
        return descriptor
    if not os.fstat(descriptor).st_nlink:  # it was removed by the process that held it
        os.close(descriptor)
        return None
    return descriptor


def differences(checkpoint: Path, config: str) -> list[str]:
    """Return `key: old -> new` for what a configuration changes against the one inside a checkpoint."""
    stored = checkpoint / folder.RUN_CONFIG
    if not stored.exists():
        return []
    old, new = flatten(yaml.safe_load(read_config(checkpoint))), flatten(yaml.safe_load(config))
    lines = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key, "(absent)"), new.get(key, "(absent)")
        if before != after:
            lines.append(f"{key}: {_short(before)} -> {_short(after)}")
    return lines


def read_config(path: Path) -> str:
    """Return the configuration inside a run or checkpoint.

    Raises:
        UserError: it is no YAML: something else wrote it.
    """
    try:
        text = (path / folder.RUN_CONFIG).read_text(encoding="utf-8")
        yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        raise UserError(
            f"{path / folder.RUN_CONFIG} is not readable as YAML; copy it from a checkpoint of the run"
        ) from None
    return text


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries and lists by their dotted keys."""
    if isinstance(tree, dict) and tree:
        items = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and tree and any(isinstance(value, dict | list) for value in tree):
        items = [(f"{prefix}[{index}]", value) for index, value in enumerate(tree)]
    else:
        return {prefix: tree}
    return {key: value for name, part in items for key, value in flatten(part, name).items()}


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else text[:56] + " ..."
