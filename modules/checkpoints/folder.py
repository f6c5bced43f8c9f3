"""Folders that are either complete or not there, the checkpoints of a run among them, and the JSON files in them.

A checkpoint is written under a temporary name beside its target, every file is flushed to the disk, a manifest
(`checkpoint.json`) is written last, and one rename makes it visible; removal renames first and deletes then. So
whatever carries the final name was complete once. The manifest holds the size of each file and a checksum of those up
to `CHECKSUM_LIMIT` bytes (reading more at every start would cost minutes on a large model): later damage shows too.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modules.errors import UserError, writing

MANIFEST = "checkpoint.json"
INDEX = ".metadata"
"""What torch writes beside the tensors of a checkpoint."""
CONFIG = "config.json"
"""The configuration in a Hugging Face folder."""
RUN_CONFIG = "config.yaml"
"""The resolved configuration of a run, in its folder and in each of its checkpoints."""
CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in that of a run."""
BEST = "best"
"""Link to the best checkpoint of a run, beside it."""
PARTIAL = ".partial"
REMOVED = ".removed"
CHECKSUM_LIMIT = 256 * 2**20
BLOCK = 2**20
"""Bytes read at a time for a checksum."""
STEP_FOLDER = re.compile(r"step=(\d{8,})")
ABOUT = "about"
"""Key of Lightning's checkpoint dictionary: what the manifest says (plain JSON values)."""
ATTACHMENTS = "attachments"
"""Key of Lightning's checkpoint dictionary: files and folders to copy into the checkpoint."""


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: it is not JSON (a Git LFS pointer, a download cut short), or no object; names the file and the mend.
        OSError: it cannot be opened.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # the latter for brackets within brackets, as in no file of a model
        raise UserError(f"{file} is not valid JSON ({error}); copy or download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} holds a JSON {type(value).__name__} where an object is needed; copy it again")
    return value


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write an object as JSON."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Flush a file or folder to the disk (a folder: its list of names)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_all(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def partial_of(target: Path) -> Path:
    """Return the temporary folder of `target`."""
    return target.with_name(target.name + PARTIAL)


def check_model(path: Path) -> None:
    """Check that a folder is a MODEL by the names of what it holds.

    Raises:
        UserError: it is none.
    """
    if not path.is_dir():
        problem = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {problem}; a MODEL is a folder on this machine: download it first")
    if not any((path / name).exists() for name in (INDEX, MANIFEST, CONFIG, CHECKPOINTS)):
        runs = sorted(child.parent for child in path.glob(f"*/{CHECKPOINTS}"))
        if runs:
            raise UserError(f"{path} holds runs, and a MODEL is one of them: {', '.join(map(str, runs[:3]))}")
        raise UserError(
            f"{path} is no MODEL: it holds neither {MANIFEST} (a folder that fit wrote), nor "
            f"{CHECKPOINTS}/ (a run's folder), nor {CONFIG} (a Hugging Face folder)"
        )


def begin(target: Path) -> Path:
    """Make an empty temporary folder for `target` and return it."""
    partial = partial_of(target)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def publish(target: Path, about: dict[str, Any]) -> None:
    """Give the temporary folder of `target` its final name, once everything in it is on the disk.

    Args:
        target: final folder; one that exists is replaced.
        about: what the manifest says of the checkpoint (plain JSON values).
    """
    partial = partial_of(target)
    files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
    manifest = about | {"files": {str(path.relative_to(partial)): _fingerprint(path) for path in files}}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    _sync_all(partial)
    if target.exists():
        remove(target)
    partial.rename(target)
    sync(target.parent)


def check_new(output: Path) -> None:
    """Check that a folder can be made.

    Raises:
        UserError: it holds files already, or is a file.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; name a folder that does not exist yet")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} holds files already; name another folder, or delete it")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give a folder to fill that becomes `output`, flushed to the disk, once the block ends; else nothing is left.

    Args:
        output: must not exist, or be an empty folder.

    Raises:
        UserError: it holds files already.
        OSError: the disk is full, or the folder cannot be written.
    """
    check_new(output)
    target = output.absolute()
    partial = begin(target)
    try:
        yield partial
        _sync_all(partial)
        partial.rename(target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with writing(output):
            raise


def remove(folder: Path) -> None:
    """Remove a checkpoint folder: first its name, then its files, so that no half of it can be taken for a whole."""
    removed = folder.with_name(folder.name + REMOVED)
    if removed.exists():
        shutil.rmtree(removed)
    folder.rename(removed)
    shutil.rmtree(removed)


def clean(parent: Path) -> None:
    """Delete what an interrupted save or removal left in a folder of checkpoints."""
    for suffix in (PARTIAL, REMOVED):
        for leftover in parent.glob(f"*{suffix}"):
            shutil.rmtree(leftover)


def checkpoints(parent: Path) -> list[Path]:
    """Return the checkpoint folders of a run, newest first, whether damaged or not."""
    found = [path for path in parent.glob("step=*") if STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def best(found: Iterable[Path], metric: str, *, measured: str = "validated", highest: bool = False) -> list[Path]:
    """Return the checkpoints of which a metric is known, the best first; of equals the newer.

    Args:
        found: checkpoints.
        metric: its name.
        measured: key of the manifest that says whether the metric is of the checkpoint's own step.
        highest: whether the highest is best; false: the lowest.
    """
    scored = []
    for path in found:
        try:
            about = describe(path)
        except UserError:  # damaged
            continue
        value = about.get("metrics", {}).get(metric)
        if about.get(measured) and value is not None and value == value:
            scored.append((-value if highest else value, -step_of(path), path))
    return [path for *_, path in sorted(scored)]


def link(name: Path, target: Path) -> None:
    """Make a name a link to a folder beside it, in one step."""
    partial = name.with_name(name.name + ".new")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target.name, target_is_directory=True)
    partial.replace(name)


def step_folder(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint that a run takes after a step."""
    return run / CHECKPOINTS / f"step={step:08d}"


def newest(parent: Path, whole: bool = True) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the newest complete checkpoint of a run, and the damaged ones that are newer, with what is wrong.

    Args:
        parent: folder of the checkpoints.
        whole: see `damage`.
    """
    damaged = []
    for path in checkpoints(parent):
        problem = damage(path, whole)
        if problem is None:
            return path, damaged
        damaged.append((path, problem))
    return None, damaged


def step_of(folder: Path) -> int:
    """Return the optimiser step in the name of a checkpoint folder.

    Raises:
        UserError: the name is not of the form `step=00000123`.
    """
    match = STEP_FOLDER.fullmatch(folder.name)
    if match is None:
        raise UserError(f"{folder} is not named like a checkpoint (step=00000123)")
    return int(match[1])


def describe(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint folder.

    Raises:
        UserError: the folder has none that can be read.
    """
    try:
        return read_json(folder / MANIFEST)
    except (OSError, UserError) as error:
        raise UserError(f"{folder} is no complete checkpoint: {MANIFEST} cannot be read ({error})") from error


def damage(folder: Path, whole: bool = True) -> str | None:
    """Return what is wrong with a checkpoint folder in a few words, or None if it is complete.

    Args:
        folder: the checkpoint.
        whole: whether files are read, or only their sizes looked at.
    """
    try:
        files = [(name, size, checksum) for name, (size, checksum) in describe(folder)["files"].items()]
    except (AttributeError, KeyError, TypeError, ValueError):
        return f"{MANIFEST} cannot be read"
    for name, size, checksum in files:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if whole and _fingerprint(path) != [size, checksum]:
            return f"{name} has changed"
    return None


def _fingerprint(path: Path) -> list[int | None]:
    size = path.stat().st_size
    if size > CHECKSUM_LIMIT:
        return [size, None]
    checksum = 0
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            checksum = zlib.crc32(block, checksum)
    return [size, checksum]
