"""The command line of a run, checked before anything slow is imported: keys, files, what a flag may leave out.

`fit`, `validate`, `test`, and the commands that take the command line of `fit`, start with seconds of imports. What is
wrong without them is said before: an unknown key or option, a file, corpus or MODEL that is not there.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from app.keys import OF_A_CLASS, Keys, Place, answer_unknown, keys_of, leaves, walk
from app.options import check_local
from app.signatures import Kind, parameters, subclasses
from modules.checkpoints import folder
from modules.errors import UserError

CALLBACKS = {
    "mock_step": "callbacks.mock_step.MockStep",
    "console": "callbacks.console.Console",
    "validation": "callbacks.validation.Validation",
    "samples": "callbacks.samples.Samples",
    "environments": "callbacks.environments.Environments",
    "skipped_batches": "callbacks.skipped_batches.SkippedBatches",
    "health": "callbacks.health.Health",
    "quantization_health": "callbacks.quantization.QuantizationHealth",
    "checkpoint": "callbacks.checkpoint.Checkpoint",
}
"""Group of keys -> callback."""

OWNED = {
    "precision": "weights are always fp32 and the formats of the layers are model.init_args.precision",
    "plugins": "formats are set by model.init_args.precision, processes by torchrun or SLURM",
    "max_epochs": "the whole run is one epoch, as long as data.init_args.total_tokens",
    "min_epochs": "the whole run is one epoch, as long as data.init_args.total_tokens",
    "min_steps": "the run is as long as data.init_args.total_tokens",
    "accumulate_grad_batches": "it follows from data.init_args.global_batch_size and micro_batch_size",
    "gradient_clip_val": "clipping is a setting of the optimiser in model.init_args",
    "gradient_clip_algorithm": "clipping is a setting of the optimiser in model.init_args",
    "check_val_every_n_epoch": "use validation.every_n_steps",
    "val_check_interval": "use validation.every_n_steps",
    "num_sanity_val_steps": "the model is validated before the first step",
    "overfit_batches": "use a small corpus",
    "limit_train_batches": "use trainer.max_steps",
    "limit_predict_batches": "there is no predict",
    "use_distributed_sampler": "the data module gives each device its rows",
    "reload_dataloaders_every_n_epochs": "the whole run is one epoch",
    "enable_checkpointing": "use checkpoint.every_n_steps",
    "enable_progress_bar": "use console.every_n_steps",
    "enable_model_summary": "`plan` prints the parameters",
    "enable_autolog_hparams": "config.yaml in the run folder says it all",
    "inference_mode": "sharded weights need plain no-gradient mode",
    "sync_batchnorm": "the models have no batch normalisation",
    "barebones": "callbacks are part of the program",
    "fast_dev_run": "use trainer.max_steps",
    "model_registry": "it is a product of Lightning's makers",
}
"""Trainer arguments that are no keys of a run file, each with what to use instead."""

OURS = ("app", "callbacks", "datamodules", "modules")
EXAMPLE = "configs/pretrain.yaml"
CONFIG_OPTIONS = ("-c", "--config")
NO_VALUE = re.compile(r"(-h|--help|--print_config(=.*)?|--[\w.]+\.help)$")
"""Options that ask for a text, and need no value."""
TEXTS = ("name",)
"""Keys whose value is a text whatever it looks like."""
LONGEST_NAME = 255
"""Bytes of a name in a file system."""
UNCHECKED = re.compile(r"(.*\.help|.*\+|-h|help|print_config)$")
"""Options that are no keys, or add to a list."""


@cache
def run_keys() -> Keys:
    """Return the keys of a run file."""
    trainer = parameters("lightning.pytorch.Trainer") or {}
    return {
        "name": None,
        "seed_everything": None,
        "trainer": {key: kind for key, kind in trainer.items() if key not in OWNED},
        "model": None,
        "data": None,
        **{key: parameters(path) for key, path in CALLBACKS.items()},
        "ckpt_path": None,
    }


def owned_keys() -> dict[str, str]:
    """Return dotted keys that are none of a run file, each with what to use instead."""
    return {f"trainer.{key}": mend for key, mend in OWNED.items()} | {"fit": "its keys stand at the top level"}


class RunArguments:
    """What a command line of `fit` says, its files read and put together as the parser will.

    Args:
        args: command line after the command's name.
        command: `fit`, `validate` or `test`.

    Raises:
        UserError: a file is missing or no YAML, or an option has no place.
    """

    def __init__(self, args: Sequence[str], command: str) -> None:
        self.command, self.keys = command, run_keys()
        self.args: list[str] = []
        """The command line with `=true` behind each flag that stands alone."""
        self.files: dict[str, Any] = {}
        """What each run file holds, by name."""
        self.tree: dict[str, Any] = {}
        """All of them and the options, the later before the earlier."""
        self.unfinished: list[str] = []
        """Options that are no flags and have no value."""
        for option, value, words in options_of(args):
            key = option.removeprefix("--")
            if value is None:
                kind = kind_of(self.keys, self.tree, key)
                if option in CONFIG_OPTIONS:
                    raise UserError(f"{option} needs a value: {option} {EXAMPLE}")
                if not (isinstance(kind, Kind) and kind.is_flag):
                    self.unfinished.append(option)
                value, words = "true", [f"{option}=true"]
            self.args += words
            if option in CONFIG_OPTIONS:
                check_local(value, option)
                self.files[value] = read_yaml(Path(value))
                merge(self.tree, self.files[value])
            elif not UNCHECKED.match(key):
                set_key(self.tree, key, value)

    def file_of(self, path: str) -> str | None:
        """Return the last file that holds the value of a dotted key, None if an option does."""
        value = find(self.tree, path)
        return next((name for name, tree in reversed(self.files.items()) if find(tree, path) == value), None)

    def get(self, path: str, default: Any = None) -> Any:
        """Return the value of a dotted key."""
        found = find(self.tree, path)
        return default if found is MISSING else found


MISSING = object()


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # pyright: ignore[reportGeneralTypeIssues]
    """YAML's loader (ten times as fast where the C library is there) that takes no key twice: one would be lost."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping.

        Raises:
            yaml.YAMLError: a key stands in it twice.
        """
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen:
                problem = f"the key {key.value} stands here a second time; leave one of them"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def check_run(args: Sequence[str], command: str) -> RunArguments:
    """Check a command line of `fit`, `validate` or `test` as far as that takes no time, and return what it says.

    Raises:
        UserError: a key is unknown, or a file is missing; names the file or key and the mend.
    """
    given = RunArguments(args, command)
    for place in walk(given.tree, given.keys):
        name = given.file_of(place.path)
        _check_place(place, "" if name is None else f"{name}: ", given)
        if isinstance(place.value, str) and (fields := keys_of(place.kind, {})) is not None:
            part = Path(name or "").parent / place.value
            if not part.exists():
                known = ", ".join(list(fields)[:4])
                raise UserError(f"{place.path}: there is no file {part}; give one, or keys below it ({known}, ...)")
            for inner in walk(read_yaml(part, place.path), fields, place.path):
                _check_place(inner, f"{part}: ", given)
    if given.unfinished:
        raise UserError(f"{given.unfinished[0]} needs a value: {given.unfinished[0]} VALUE")
    if {"-h", "--help"} & set(args):
        return given
    missing = [key for key in ("model", "data") if given.get(key) is None]
    if missing:
        if given.files:
            raise UserError(
                f"{', '.join(given.files)}: missing key {', '.join(missing)}; {EXAMPLE} shows a whole run file"
            )
        raise UserError(f"no run file: give one with --config FILE ({EXAMPLE} is an example)")
    for key in ("model", "data"):
        _check_class(given, key)
    return given


def _check_place(place: Place, source: str, given: RunArguments) -> None:
    if place.beside is not None:
        everywhere, beside = leaves(given.keys, given.tree), place.beside
        if not source and "." not in place.path:
            beside = {**beside, "config": None}  # an option, which no file can have
        raise UserError(source + answer_unknown(place.path, beside, owned_keys(), everywhere))
    if isinstance(place.kind, dict) and not isinstance(place.value, dict | str):
        held = "is a list; it holds" if isinstance(place.value, list) else f"has {show(place.value)} in place of"
        raise UserError(f"{source}{place.path} {held} keys: {', '.join(list(place.kind)[:8])}")
    fields = keys_of(place.kind, {}) if isinstance(place.value, list) and isinstance(place.kind, Kind) else None
    if fields is not None and isinstance(place.kind, Kind) and not place.kind.is_list:
        raise UserError(f"{source}{place.path} is a list; it holds keys: {', '.join(fields)}")


def stages(key: str) -> list[str]:
    """Return the class paths of this project that `model` or `data` may have."""
    folder, base = {"model": ("modules", "StageModule"), "data": ("datamodules", "CorpusData")}[key]
    files = sorted((Path(__file__).parent.parent / folder).glob("*.py"))
    return [path for file in files for path in subclasses(f"{folder}.{file.stem}", base)]


def _check_class(given: RunArguments, key: str) -> None:
    """Answer a class path of ours that is misspelt; those of others are left to the parser."""
    chosen = given.get(key)
    known = stages(key)
    path = chosen.get("class_path") if isinstance(chosen, dict) else chosen
    if not path:
        name = given.file_of(key)
        raise UserError((f"{name}: " if name else "") + f"missing key {key}.class_path; known: {', '.join(known)}")
    path = str(path)
    module, _, name = path.rpartition(".")
    if name in [path.rpartition(".")[2] for path in known] and not module:
        return  # the parser knows it by its name alone
    if not module or (module.partition(".")[0] in OURS and parameters(path) is None):
        raise UserError(f"{key}.class_path: {path} is no class path; known: {', '.join(known)}")


CORPORA = ("datamodules.pretraining.PretrainingData", "datamodules.sft.SFTData")
"""Data that are read from prepared corpora."""
MADE_OF = ("conversations", "environment", "docstrings")
"""Keys of a source that say what to prepare it of where it is missing."""


def check_files(given: RunArguments) -> None:
    """Check what a run reads first: the MODEL it starts from, unless it goes on with its own, and its corpora.

    Raises:
        UserError: one is missing; names the key and the mend.
    """
    from datamodules.text.preparation import check_corpus

    check_name(str(given.get("name", "run")))
    root, run = Path(str(given.get("trainer.default_root_dir", "runs"))), run_of(given)
    if root.exists() and not root.is_dir():
        raise UserError(f"trainer.default_root_dir: {root} is no folder; name one that is there, or can be made")
    checkpoint = given.get("ckpt_path")
    check_local(str(root), "trainer.default_root_dir")
    check_local(str(checkpoint), "--ckpt_path")
    if checkpoint is not None and not Path(str(checkpoint)).exists():
        raise UserError(
            f"--ckpt_path: {checkpoint} does not exist; checkpoints are folders, {run}/checkpoints/step=..."
        )
    if given.command != "fit" and checkpoint is None and not folder.checkpoints(run / folder.CHECKPOINTS):
        raise UserError(
            f"{run / folder.CHECKPOINTS} holds no checkpoint: run fit first, give the --name of another run, or "
            "--ckpt_path FOLDER"
        )
    start = given.get("model.init_args.init_from")
    if start is not None and not folder.checkpoints(run / folder.CHECKPOINTS):
        try:
            folder.check_model(Path(str(start)))
        except UserError as error:
            raise UserError(f"model.init_args.init_from: {error}") from None
    sources = given.get("data.init_args.sources")
    corpora = {"data.init_args.path": given.get("data.init_args.path")}
    if isinstance(sources, dict):
        corpora = {
            f"data.init_args.sources.{name}.path": find(source, "path")
            for name, source in sources.items()
            if not any(find(source, way) for way in MADE_OF)
        }
    for key, path in corpora.items():
        if isinstance(path, str) and given.get("data.class_path") in CORPORA:
            check_corpus(path, key)


def check_name(name: str) -> None:
    """Check the name of a run.

    Raises:
        UserError: it is no plain folder name.
    """
    plain = name.isprintable() and name == name.strip() and not set(name) & set("/\\")
    if not name or name in {".", ".."} or not plain:
        raise UserError(f"name: {name!r} is no folder name; letters, digits, - and _ are safe")
    if len(name.encode(errors="surrogateescape")) > LONGEST_NAME:
        raise UserError(f"name: {name[:20]}... is longer than {LONGEST_NAME} bytes, the most a folder's name may have")


def show(value: Any) -> str:
    """Return a value as YAML writes it."""
    return "nothing" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def run_of(given: RunArguments) -> Path:
    """Return the folder of the run that a command line names."""
    return Path(str(given.get("trainer.default_root_dir", "runs"))) / str(given.get("name", "run"))


def wants_text(args: Sequence[str]) -> bool:
    """Return whether a command line asks for help or its configuration, and for no work."""
    return any(NO_VALUE.match(argument) for argument in args)


def options_of(args: Sequence[str]) -> Iterator[tuple[str, str | None, list[str]]]:
    """Yield each option of a command line with its value (None: it stands alone) and the words that it is made of.

    Raises:
        UserError: a value has no option.
    """
    rest = list(reversed(args))
    while rest:
        argument = rest.pop()
        option, equals, value = argument.partition("=")
        if not argument.startswith("--") and option not in ("-c", "-h"):
            if Path(argument).suffix in (".yaml", ".yml"):
                raise UserError(f"{argument}: a run file is given with --config {argument}")
            meant = f"; did you mean -{argument}?" if re.match("-[a-z]{2}", argument) else ""
            raise UserError(
                f"unrecognized arguments: {argument} (options start with --, several values of one are given as "
                f"[a,b]){meant}"
            )
        if equals or NO_VALUE.match(argument):
            yield option, value, [argument]
        elif not rest or re.match("--[a-z]|-[hc]$", rest[-1]):
            yield option, None, [argument]
        else:
            value = rest.pop()
            yield option, value, [argument, value]


def read_yaml(path: Path, key: str = "--config") -> Any:
    """Return what a YAML file holds.

    Args:
        path: the file.
        key: what names it.

    Raises:
        UserError: it is missing, no YAML, or no mapping of keys to values.
    """
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.load(text, Loader=Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file ({key})") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; {key} takes a YAML file such as {EXAMPLE}") from None
    except UnicodeDecodeError:
        mend = f"{key} takes a YAML file such as {EXAMPLE}, saved as UTF-8"
        raise UserError(f"{path} is no text in UTF-8; {mend}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        tab = mark is not None and text.split("\n")[mark.line][: mark.column + 1].endswith("\t")
        what = "a tab; YAML is indented with blanks" if tab else getattr(error, "problem", error)
        raise UserError(f"{path}{place}: not valid YAML: {what}") from None
    if not isinstance(tree, dict):
        what = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise UserError(f"{path}: {key} takes a file of `key: value` lines, this one holds {what}")
    return tree


def merge(into: dict[str, Any], tree: dict[str, Any]) -> None:
    """Put a run file over what stands before it; another class takes none of the arguments of the one before."""
    for key, value in tree.items():
        before = into.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            if value.get("class_path", before.get("class_path")) != before.get("class_path"):
                before.pop("init_args", None)
            merge(before, value)
        else:
            into[key] = copy.deepcopy(value)


def set_key(tree: dict[str, Any], path: str, text: str) -> None:
    """Set a dotted key of a tree to what an option says, `init_args` understood.

    Raises:
        UserError: it belongs to a class that no file has named yet.
    """
    try:
        value = text if path in TEXTS else yaml.load(text, Loader=Loader)
    except yaml.YAMLError:
        value = text
    if path in ("model", "data") and isinstance(value, str):
        value = {"class_path": value}
    *parents, last = path.split(".")
    node: Any = tree
    for depth, name in enumerate([*parents, last]):
        if depth == 1 and parents[0] in ("model", "data") and name not in OF_A_CLASS:
            if "class_path" not in node:
                raise UserError(f"{parents[0]}.init_args.{path.partition('.')[2]}: give it after --config")
        if _of_its_class(node, name):
            node = node.setdefault("init_args", {})
        if not isinstance(node, dict):
            return  # of a list, or of a part that stands in a file of its own
        if depth == len(parents):
            merge(node, {name: value})
        elif not isinstance(node.get(name), dict) and name in node and node[name] is not None:
            return
        else:
            node[name] = node.get(name) or {}
            node = node[name]


def kind_of(kind: Any, tree: Any, path: str) -> Any:
    """Return what may be at a dotted key, None if that cannot be told."""
    for name in path.split("."):
        for step in ("init_args", name) if _of_its_class(tree, name) else (name,):
            known = keys_of(kind, tree)
            kind = None if known is None else known.get(step)
            tree = tree.get(step) if isinstance(tree, dict) else None
    return kind


def _of_its_class(tree: Any, name: str) -> bool:
    """Return whether a key is one of the class that stands there, `init_args` left out."""
    return isinstance(tree, dict) and "class_path" in tree and name not in OF_A_CLASS


def find(tree: Any, path: str) -> Any:
    """Return the value at a dotted key (a list's items as key[0]), MISSING if there is none."""
    for name in re.findall(r"[^.\[\]]+", path):
        if isinstance(tree, list) and name.isdecimal() and int(name) < len(tree):
            tree = tree[int(name)]
        elif isinstance(tree, dict) and name in tree:
            tree = tree[name]
        else:
            return MISSING
    return tree
