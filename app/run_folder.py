"""The folder of a run: what is in it, whether it is finished, and where the same command goes on.

runs/<name>/config.yaml                      the resolved configuration of the newest start
runs/<name>/checkpoints/step=00000123/       see modules/checkpoints/folder.py
runs/<name>/spikes/step=00000123.pt          see callbacks/skipped_batches.py
runs/<name>/events.out.tfevents.*            TensorBoard
"""

from pathlib import Path
from typing import Any

import yaml

from modules.checkpoints import folder
from modules.errors import UserError

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
        if not name or name in {".", ".."} or set(name) & set("/\\") or name != name.strip():
            raise UserError(f"name: {name!r} is no folder name; letters, digits, - and _ are safe")
        self.path = root / name
        self.name = name

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

    def save_config(self, text: str) -> None:
        """Write the resolved configuration; it replaces that of an earlier start in one step."""
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.path / (folder.RUN_CONFIG + folder.PARTIAL)
        partial.write_text(text, encoding="utf-8")
        folder.sync(partial)
        partial.rename(self.path / folder.RUN_CONFIG)


def differences(checkpoint: Path, config: str) -> list[str]:
    """Return `key: old -> new` for what a configuration changes against the one inside a checkpoint."""
    stored = checkpoint / folder.RUN_CONFIG
    if not stored.exists():
        return []
    old, new = (flatten(yaml.safe_load(text)) for text in (stored.read_text(encoding="utf-8"), config))
    lines = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key, "(absent)"), new.get(key, "(absent)")
        if before != after:
            lines.append(f"{key}: {_short(before)} -> {_short(after)}")
    return lines


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
