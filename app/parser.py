"""The parser of run files and their command line, with answers of one line.

jsonargparse prints its whole usage (some fifty lines) before an error and nests the reasons in more; here its message
is cut to the key, the reason and the file.
"""

import re
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from app.explain import explain
from app.run_keys import RunArguments
from modules.errors import UserError

EXAMPLES = {
    "trainer.callbacks": "no class that can be imported, such as lightning.pytorch.callbacks.EarlyStopping",
    "trainer.logger": "no class that can be imported, such as lightning.pytorch.loggers.CSVLogger",
    "data.init_args.sources": "not what it takes, a mapping such as {code: {path: data/code}}",
    "data.init_args.phases": "not what it takes, a list such as [{sources: {code: 1}}]",
}
"""Key -> what a value is that it does not take, and one that it takes."""


class RunParser(LightningArgumentParser):
    """LightningCLI's parser with short errors. `given`, a command line that was checked, is set by the CLI."""

    given: RunArguments

    def parse_args(self, args: list[str], **kwargs: Any) -> Any:  # type: ignore[override]
        """Parse a command line; that of a run was read before, and its flags completed.

        Raises:
            UserError: with one line that names the key or file and the mend.
        """
        if self.is_whole:
            args = self.given.args
        else:  # for one key of a part, with the value that jsonargparse has read and written out again as Python does
            args = [re.sub("=None$", "=null", argument) for argument in args]
        return super().parse_args(args, **kwargs)

    @property
    def is_whole(self) -> bool:
        """Whether this is the parser of a run file (jsonargparse makes others for parts of one)."""
        return hasattr(self, "given")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a UserError with the essence of a message of jsonargparse."""
        if not self.is_whole:
            super().error(message, ex)
        raise UserError(self._condense(*explain(message, ex))) from ex

    def _condense(self, key: str, reason: str) -> str:
        if not reason:
            return f"unknown key {key}"
        if reason.startswith("missing key"):
            return self._missing(reason.removeprefix("missing key ").split(", "))
        dotted = reason.startswith("Expected a dot import path string")
        if key in EXAMPLES and (dotted or reason.startswith("expected ")):
            return f"{key}: {reason.rpartition(': ' if dotted else ', got ')[2]} is {EXAMPLES[key]}"
        if dotted:
            reason = (
                f"{reason.rpartition(': ')[2]} is not what it takes: a mapping is given whole, as '{{name: {{...}}}}'"
            )
        return f"{key}: {reason}" if key else reason

    def _missing(self, keys: list[str]) -> str:
        """Return the message for keys that a class, named in a run file or by an option, cannot do without."""
        parent, _, last = keys[0].rpartition(".")
        parent = parent.removesuffix(".init_args")
        chosen = self.given.get(parent)
        class_path = chosen.get("class_path") if isinstance(chosen, dict) else chosen
        if not isinstance(class_path, str):
            return f"{', '.join(self.given.files)}: missing key {', '.join(keys)}"
        names = [f"{parent}.init_args.{key.rpartition('.')[2]}" for key in keys]
        where = self.given.file_of(parent)
        mend = "" if where else f"; add --{parent}.init_args.{last} VALUE"
        return (f"{where}: " if where else "") + f"missing key {', '.join(names)}, which {class_path} needs{mend}"
