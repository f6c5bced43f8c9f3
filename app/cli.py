"""`fit`, `validate` and `test`: a LightningCLI that reads a run file, and goes on with a run that exists.

It keeps Lightning's way of building model, data and trainer from YAML, and departs from it where a run would lose
exactness or a user would be surprised:

* only the parser of the command that was called is built, at the top level (no `fit:` key);
* nothing in a checkpoint changes the configuration: the command line wins over YAML, YAML over the defaults;
* trainer settings that the program depends on are not keys at all; asking for one names the key to use instead;
* every callback of ours is a group of keys (`validation.every_n_steps`), so that a second run file cannot lose one;
* the same command in the same folder resumes by itself, or says that the run is finished.
"""

import re
from argparse import Action
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

import app.strategies  # noqa: F401 (registers the strategy "sharded")
from app import environment
from app.command_line import HelpFormatter
from app.errors import shorten
from app.logger import RunLogger, RunStart
from app.loop import use_step_loop
from app.noise import silence
from app.parser import RunParser
from app.run_folder import ROOT, SHOWN, RunFolder, differences
from app.run_keys import CALLBACKS, OWNED, check_run, stages, wants_text
from app.strategies import ShardedStrategy
from callbacks.checkpoint import RandomState
from callbacks.console import Startup, Summary, validation_line
from callbacks.dashboard import Dashboard
from callbacks.data_use import DataUse
from callbacks.preemption import Preemption, TimeLimit
from callbacks.speed import Speed
from callbacks.step import check_interval, in_order
from callbacks.stop_request import STOP
from callbacks.text import fold
from datamodules.base import StageData
from modules.base import StageModule
from modules.batch import HeldOutText
from modules.checkpoints import folder
from modules.errors import UserError

COMMANDS = ("fit", "validate", "test")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda")
"""What the program has run on, or is made for."""

BASES = {"model": StageModule, "data": StageData}
"""Key -> what its class must be. The parser asks for less: it would take the arguments of a base as keys of its own."""

TRAINER_HELP = {
    "accelerator": "Kind of device: auto (a GPU if there is one), cpu or gpu.",
    "strategy": "How the model is laid over devices: sharded (FSDP2, on one device too); or the class "
    "app.strategies.ShardedStrategy with init_args.gradient_sync: every, where whole gradients do not fit a device.",
    "logger": "Loggers beside TensorBoard, which always writes: one or a list of class_path and init_args, for example "
    "lightning.pytorch.loggers.CSVLogger with save_dir, or WandbLogger (package wandb) with project.",
    "callbacks": "Own callbacks: a list of class_path and init_args, for example "
    "lightning.pytorch.callbacks.EarlyStopping with monitor: validation/loss.",
    "profiler": "Lightning's profiler of a run: simple, advanced, pytorch, or a class.",
}
"""What `--help` says of keys of which Lightning's own text names what is refused here."""

FORCED: dict[str, Any] = {
    "precision": "32-true",
    "max_epochs": 1,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_autolog_hparams": False,
    "inference_mode": False,
}
"""Trainer arguments that the program depends on."""


class RunHelp(HelpFormatter):
    """Help without the list of Lightning's subclasses, most of which are refused."""

    def _expand_help(self, action: Action) -> str:
        return re.sub(r",? ?known subclasses: [^)]*", "", super()._expand_help(action)).replace(" ()", "")


class RunCLI(LightningCLI):
    """Parses a run; `run` carries it out.

    Args:
        args: command line after the command's name.
        command: `fit`, `validate` or `test`.

    Raises:
        UserError: the command line or a run file is wrong.
    """

    def __init__(self, args: list[str], command: str = "fit") -> None:
        self.command = command
        self.given = check_run(args, command)
        self.helps = bool({"-h", "--help"} & set(args))
        silence()
        if wants_text(args):  # it takes a second to find them, so only where somebody reads them
            set_parsing_settings(docstring_parse_attribute_docstrings=True)
        super().__init__(
            save_config_callback=None,  # written by `fit`, which also keeps a copy in each checkpoint
            seed_everything_default=1,
            parser_class=RunParser,
            parser_kwargs={
                "prog": f"{environment.command()} {command}",
                "description": SUMMARIES[command],
                "dump_header": None,
                "formatter_class": RunHelp,
                "usage": "%(prog)s --config FILE [--config FILE ...] [--key VALUE ...]",
            },
            args=args,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
        root = self.config.trainer.default_root_dir
        if not root:
            raise UserError("trainer.default_root_dir is empty; name a folder (runs), or leave it out")
        if self.config.ckpt_path == "":
            raise UserError("--ckpt_path is empty; name a checkpoint, or leave it out for the run's newest")
        check_intervals(self.config.trainer)
        self.run_folder = RunFolder(Path(root), self.config.name)

    # -- keys ---------------------------------------------------------------------------------------------------------

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys of a run file."""
        parser.add_argument(
            "--name", type=str, default="run", help="Name of the run; its folder is trainer.default_root_dir / name."
        )
        parser.add_class_arguments(
            Trainer, "trainer", skip=set(OWNED), instantiate=False, fail_untyped=False, sub_configs=True
        )
        parser.set_defaults(
            {"trainer.strategy": "sharded", "trainer.default_root_dir": str(ROOT), "trainer.log_every_n_steps": 1}
        )
        for key, help in TRAINER_HELP.items():
            parser._option_string_actions[f"--trainer.{key}"].help = help
        for key, base in {"model": LightningModule, "data": LightningDataModule}.items():
            if self.helps:
                self._explain_class(parser, key)
            else:
                parser.add_subclass_arguments(base, key, fail_untyped=False, required=True)
        for key, path in CALLBACKS.items():
            parser.add_lightning_class_args(resolve_name(path), key)
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="Checkpoint folder; the run's newest unless given."
        )
        assert isinstance(parser, RunParser)
        parser.given = self.given

    def _explain_class(self, parser: LightningArgumentParser, key: str) -> None:
        """Add the keys of the class that the run file names, or of the first stage, for `--help` only."""
        known = stages(key)
        chosen = self.given.get(f"{key}.class_path", known[0])
        parser.add_argument(
            f"--{key}.class_path", type=str, default=chosen, help=f"Class of `{key}`; ours: {', '.join(known)}."
        )
        parser.add_class_arguments(resolve_name(chosen), f"{key}.init_args", fail_untyped=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line."""
        if self.helps:
            parser.print_help()
            raise SystemExit(0)
        self.config = parser.parse_args(args)

    def _set_seed(self) -> None:
        seed = self.config.seed_everything
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise UserError(f"seed_everything: {seed} must lie between 0 and 2**32 - 1")
        super()._set_seed()

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: Lightning would overwrite it with what a checkpoint holds."""

    def config_text(self) -> str:
        """Return the resolved configuration, complete with all defaults and the content of files that it names."""
        config = self.config.clone()
        del config["ckpt_path"]  # belongs to a start, not to the run
        return self.parser.dump(config, skip_unset=False)

    # -- building -----------------------------------------------------------------------------------------------------

    def instantiate_classes(self) -> None:
        """Build nothing yet: `plan` only parses, and a finished run needs nothing."""

    def instantiate(self, key: str) -> Any:
        """Build `model`, `data` or a group of a callback from the configuration.

        Raises:
            UserError: a value is refused by the class.
        """
        from jsonargparse import Namespace

        try:
            made = self.parser.instantiate(Namespace({key: self.config[key]}))[key]
        except ValueError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, UserError | ModuleNotFoundError):
                cause = cause.__cause__ or cause.__context__  # the parser wraps what the class said
            if cause is None:
                raise
            what = f"{key}: a package is missing: " if isinstance(cause, ModuleNotFoundError) else ""
            raise UserError(what + shorten(str(cause))) from error
        if not isinstance(made, BASES.get(key, object)):
            raise UserError(f"{key}: {self.config[key].class_path} is no {BASES[key].__name__}")
        return made

    def _build(self, callbacks: list[Callback], logger: Any, checkpoint: Path | None) -> Trainer:
        self.model, self.datamodule = self.instantiate("model"), self.instantiate("data")
        if checkpoint is not None:
            self.model.resume_from = checkpoint
            if self.model.lora is None:  # adapters need their base
                self.model.init_from = None
        check_devices(self.config.trainer)
        given = self.instantiate("trainer").as_dict()
        own = given["callbacks"] or []
        own = own if isinstance(own, list) else [own]
        limit = given.pop("max_time")
        given["logger"] = [logger, *_loggers(given["logger"])] if logger is not None else False
        given["default_root_dir"] = str(self.run_folder.path)
        strategy = given["strategy"]
        if strategy != "sharded" and not isinstance(strategy, ShardedStrategy):
            shown = self.config.trainer.strategy or "''"
            raise UserError(f"trainer.strategy: {shown} is none of ours; leave it out or say sharded")
        try:
            own = own if limit is None else [*own, TimeLimit(limit)]
            given["callbacks"] = in_order([*callbacks, *own])
            trainer = Trainer(**given, **FORCED)
        except UserError:
            raise
        except (ValueError, TypeError, MisconfigurationException, ModuleNotFoundError) as error:
            raise UserError(f"trainer: {shorten(str(error))}") from error
        assert isinstance(trainer.strategy, ShardedStrategy)
        STOP.before_leaving.append(trainer.strategy.end_processes)
        use_step_loop(trainer)
        return trainer

    # -- commands -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Carry out the command."""
        getattr(self, self.command)()

    def fit(self) -> None:
        """Train, from the start or from the run's newest checkpoint; say so if nothing is left to do."""
        if getattr(rank_zero_only, "rank", 0):
            self._fit()
            return
        with self.run_folder.locked():
            STOP.before_leaving.append(self.run_folder.release)
            self._fit()

    def _fit(self) -> None:
        config = self.config_text()
        checkpoint = self._given() or self._newest()
        changes = differences(checkpoint, config) if checkpoint is not None else []
        if checkpoint is not None and not changes and folder.describe(checkpoint)["finished"]:
            self._say_finished(checkpoint)
            return
        if self.config.trainer.max_steps == 0:
            raise UserError("trainer.max_steps: 0 trains nothing; give a positive number, or -1 for the whole run")
        groups: dict[str, Any] = {key: self.instantiate(key) for key in CALLBACKS}
        logger = RunLogger(self.run_folder.path, folder.step_of(checkpoint) if checkpoint is not None else 0)
        interval = groups["console"].every_n_steps
        next_start = "the same command without --ckpt_path" if self.config.ckpt_path else "the same command"
        preemption, speed = Preemption(groups["checkpoint"], next_start), Speed(interval)
        begin = [RunStart(self.run_folder, config, checkpoint), RandomState(), DataUse(interval), speed, Startup(speed)]
        summary = Summary(environment.command("app.tensorboard"), next_start)
        trainer = self._build([*begin, Dashboard(interval), *groups.values(), preemption, summary], logger, checkpoint)
        logger.trainer = trainer
        self.model.check_run(self.datamodule, trainer.strategy.root_device.type)
        if checkpoint is not None and self._is_finished(checkpoint, changes):
            return
        trainer.fit(self.model, self.datamodule, ckpt_path=checkpoint)

    def validate(self) -> None:
        """Print the validation metrics of the run's newest checkpoint, or of `--ckpt_path`."""
        self._evaluate()

    def test(self) -> None:
        """Print the test metrics of the run's newest checkpoint, or of `--ckpt_path`."""
        self._evaluate()

    def _evaluate(self) -> None:
        checkpoint = self._given() or self._newest()
        if checkpoint is None:
            raise UserError(
                f"{self.run_folder.checkpoints} holds no checkpoint: run fit first, or give --ckpt_path FOLDER"
            )
        trainer = self._build([], None, checkpoint)
        evaluate = getattr(trainer, self.command)
        evaluate(self.model, datamodule=self.datamodule, ckpt_path=checkpoint, verbose=False)
        if not self.model.metrics:
            raise UserError(
                "trainer: nothing was measured; let limit_val_batches and limit_test_batches be more than 0"
            )
        gzip = self.datamodule.gzip_bits_per_byte() if isinstance(self.datamodule, HeldOutText) else None
        about = folder.describe(checkpoint)
        name = {"validate": "validation"}.get(self.command, self.command)
        _say(f"{checkpoint}: {validation_line(about['step'], self.model.metrics, gzip, name)}")

    def _given(self) -> Path | None:
        """Return the checkpoint of `--ckpt_path`; `fit` goes on from those of its own run only."""
        if not self.config.ckpt_path:
            return None
        path, run = Path(self.config.ckpt_path), self.run_folder.path
        if (path / folder.CHECKPOINTS).is_dir():
            names = ", ".join(step.name for step in folder.checkpoints(path / folder.CHECKPOINTS))
            raise UserError(f"--ckpt_path: {path} is a run; name a checkpoint in {path / folder.CHECKPOINTS} ({names})")
        if problem := folder.damage(path):
            what = problem.removeprefix(f"{path} is ")
            place = self.run_folder.checkpoints
            raise UserError(f"--ckpt_path: {path} is no complete checkpoint: {what}; name a folder of {place}")
        if self.command == "fit":
            path = path.resolve()  # `best` is a link
            if run.resolve() not in path.parents:
                raise UserError(
                    f"--ckpt_path: {path} is no checkpoint of run {self.run_folder.name} ({run}); a new run starts "
                    f"from it by another --name and --model.init_args.init_from {path}"
                )
            path = run / path.relative_to(run.resolve())
        return path

    def _newest(self) -> Path | None:
        checkpoint, passed = self.run_folder.newest()
        for line in passed:
            _say(f"warning: {line}")
        return checkpoint

    def _is_finished(self, checkpoint: Path, changes: list[str]) -> bool:
        """Say where a run that was built stands and what has changed; return whether there is nothing left to do.

        Raises:
            UserError: the configuration ends before the checkpoint.
        """
        step, last, most = folder.step_of(checkpoint), self.datamodule.total.steps, self.config.trainer.max_steps
        last, ends_by = (most, "trainer.max_steps") if 0 < most < last else (last, "data")
        if step > last:
            raise UserError(
                f"{ends_by}: the run is to end at step {last}, but {checkpoint} is of step {step} already; raise it, "
                f"or go back to a step of {self.run_folder.checkpoints} with --ckpt_path"
            )
        finished = step == last
        if finished:
            self._say_finished(checkpoint)
        else:
            _say(f"run {self.run_folder.name} ({self.run_folder.path}) goes on after step {step} of {last}")
        if changes:
            _say("changed since the checkpoint:" if not finished else "changed since, to no effect:")
            for line in changes[:SHOWN]:
                _say(f"  {line}")
            if len(changes) > SHOWN:
                _say(f"  and {len(changes) - SHOWN} more")
        return finished

    def _say_finished(self, checkpoint: Path) -> None:
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in folder.describe(checkpoint)["metrics"].items())
        step = folder.step_of(checkpoint)
        _say(f"run {self.run_folder.name} ({self.run_folder.path}) is finished: {step} steps. {metrics}")
        _say("Nothing to do. Give another --name for a new run, or change the configuration to train longer.")


SUMMARIES = {command: (getattr(RunCLI, command).__doc__ or "").splitlines()[0] for command in COMMANDS}


def parse_run(args: list[str]) -> RunCLI:
    """Parse a run with the parser of `fit`, building nothing (for `plan`).

    Args:
        args: like the command line of `fit`, for example `["--config", "configs/pretrain.yaml"]`.

    Raises:
        UserError: a file or key is wrong.
    """
    return RunCLI(args)


def check_intervals(trainer: Any) -> None:
    """Check the keys of the trainer that count steps.

    Raises:
        UserError: one is out of range.
    """
    steps = trainer.max_steps
    if steps == 0 or steps < -1:
        raise UserError(f"trainer.max_steps: {steps} trains nothing; give a positive number, or -1 for the whole run")
    if trainer.log_every_n_steps is not None:
        check_interval(trainer.log_every_n_steps, "trainer.log_every_n_steps")


def check_devices(trainer: Any) -> None:
    """Check that this machine has the devices that a run file asks for.

    Args:
        trainer: the keys of the trainer.

    Raises:
        UserError: it has not; names the key and the mend.
    """
    kind, devices = trainer.accelerator, trainer.devices
    if kind not in ACCELERATORS:
        raise UserError(f"trainer.accelerator: {kind} is none of {', '.join(ACCELERATORS)}")
    gpus = torch.cuda.device_count()
    if kind in ("gpu", "cuda") and not gpus:
        why = "has no CUDA" if torch.version.cuda is None else "finds none"
        raise UserError(
            f"trainer.accelerator: {kind}, but this machine has no GPU that torch can use (torch {torch.__version__} "
            f"{why}); say auto or cpu, which trains slowly"
        )
    on_gpus = gpus and kind != "cpu"
    wanted = devices if isinstance(devices, int) else int(devices) if str(devices).lstrip("-").isdecimal() else None
    if wanted is None and devices != "auto" and not on_gpus:
        raise UserError(f"trainer.devices: {devices} is no number of processes, which a CPU needs; or say auto")
    if wanted is not None and (wanted < -1 or wanted == 0 or (wanted == -1 and not on_gpus)):
        raise UserError(f"trainer.devices: {devices} must be at least 1, or auto")
    if wanted is not None and on_gpus and wanted > gpus:
        raise UserError(f"trainer.devices: {wanted}, but this machine has {gpus} GPUs; give {gpus} or less, or auto")


def _loggers(given: Any) -> list[Any]:
    if given in (None, True, False):
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


@rank_zero_only
def _say(line: str) -> None:
    print(fold(line), flush=True)
