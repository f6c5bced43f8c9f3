"""The parser of run files and their command line, with answers of one line.

jsonargparse prints its whole usage (some fifty lines) before an error and nests the reasons in more; here its message
is cut to the key, the reason and the file.
"""

import re
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from app.explain import explain
from app.keys import Keys, check_keys, find, unknown_key
from modules.errors import UserError

CONFIG_OPTIONS = ("-c", "--config")


class RunParser(LightningArgumentParser):
    """LightningCLI's parser with short errors. `keys` and `owned` are set by the CLI that fills it."""

    keys: Keys
    owned: dict[str, str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._files: dict[str, Any] = {}

    def parse_args(self, args: list[str], **kwargs: Any) -> Any:  # type: ignore[override]
        """Parse a command line; unknown keys in its files are answered first.

        Raises:
            UserError: with one line that names the key or file and the mend.
        """
        if self.keys_are_set:
            self._files = {name: read_yaml(Path(name)) for name in config_files(args)}
            for name, tree in self._files.items():
                check_keys(tree, self.keys, name, "", self.owned)
        else:  # for one key of a part, with the value that jsonargparse has read and written out again as Python does
            args = [re.sub("=None$", "=null", argument) for argument in args]
        return super().parse_args(args, **kwargs)

    @property
    def keys_are_set(self) -> bool:
        """Whether this is the parser of a run file (jsonargparse makes others for parts of one)."""
        return hasattr(self, "keys")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a UserError with the essence of a message of jsonargparse."""
        if not self.keys_are_set:
            super().error(message, ex)
        raise UserError(self._condense(*explain(message, ex))) from ex

    def _condense(self, key: str, reason: str) -> str:
        if not reason:
            return self._unknown(key)
        if reason.startswith("unrecognized arguments: "):
            return f"{reason} (options start with --, several values of one are given as [a,b])"
        if reason.startswith("missing key"):
            no_file = "no run file: give one with --config FILE (configs/pretrain.yaml is an example)"
            return f"{', '.join(self._files)}: {reason}" if self._files else no_file
        return f"{key}: {reason}" if key else reason

    def _unknown(self, name: str) -> str:
        parents, _, key = name.rpartition(".")
        for tree in [*self._files.values(), {}]:
            if keys := find(self.keys, tree, parents.split(".") if parents else []):
                return f"{name}: give it after --config" if key in keys else unknown_key(name, keys, self.owned)
        return f"unknown key {name}"


def config_files(args: list[str]) -> list[str]:
    """Return the run files that a command line names."""
    files = []
    for index, argument in enumerate(args):
        option, equals, value = argument.partition("=")
        if option in CONFIG_OPTIONS:
            files += [value] if equals else args[index + 1 : index + 2]
    return files


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds.

    Raises:
        UserError: it is missing, no YAML, or no mapping of keys to values.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file (--config)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path}{place}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a run file holds `key: value` lines, this one holds {type(tree).__name__}")
    return tree
