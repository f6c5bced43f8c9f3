"""The program as a user meets it: help, commands, and answers to mistakes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from app.__main__ import commands, usage
from tests.app.helpers import ROOT, RUN_FILE, Program

ANSI_OR_TRACE = re.compile(r"Traceback|usage:")


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_help_lists_the_commands_and_imports_nothing_slow():
    code = (
        "import sys; from app.__main__ import main; main(['--help']); "
        "print(sorted({'torch', 'lightning', 'numpy', 'jsonargparse', 'yaml'} & set(sys.modules)), file=sys.stderr)"
    )
    result = python("-c", code)
    assert result.stderr == "[]\n"
    listed = re.findall(r"^  (\w+) +\w", result.stdout, re.MULTILINE)
    assert listed[:3] == ["fit", "validate", "test"]
    ours = sorted(file.stem for file in (ROOT / "app" / "commands").glob("[a-z]*.py"))
    assert listed[3:] == [*ours, "completion", "help", "version"]


def test_help_of_fit_explains_its_keys_and_builds_one_parser():
    code = (
        "import lightning.pytorch.cli as cli; made = []; init = cli.LightningArgumentParser.__init__\n"
        "def count(self, *args, **kwargs): made.append(kwargs.get('prog')); init(self, *args, **kwargs)\n"
        "cli.LightningArgumentParser.__init__ = count\n"
        "from app.__main__ import main\n"
        "try: main(['fit', '--help'])\n"
        "except SystemExit as error: print('\\ncode', error.code, made)"
    )
    result = python("-c", code)
    assert "code 0 ['python -m app fit']" in result.stdout, result.stderr
    for text in ("--validation.every_n_steps", "Optimiser steps between validations", "default: 100"):
        assert text in result.stdout
    assert "--trainer.max_epochs" not in result.stdout


def test_usage_names_every_command_with_its_first_line():
    text = usage({"prepare": "Turn texts into rows"})
    assert "  prepare     turn texts into rows" in text


def test_commands_are_found_without_being_imported():
    before = set(sys.modules)
    assert all(commands().values()), "a command has no documentation"
    assert not [name for name in set(sys.modules) - before if name.startswith("app.commands.")]


@pytest.mark.parametrize(
    ("args", "code", "answer"),
    [
        ([], 2, "usage: "),
        (["fti"], 2, "error: no command fti; did you mean fit?"),
        (["zzz"], 2, "error: no command zzz; see python -m app --help"),
        (["fit"], 2, "error: no run file: give one with --config FILE (configs/pretrain.yaml is an example)"),
        (["fit", "--config"], 2, "error: --config needs a value: --config configs/pretrain.yaml"),
        (["fit", "--config", "none.yaml"], 2, "error: none.yaml: there is no such file (--config)"),
    ],
)
def test_mistakes_before_a_run_file_is_read(program: Program, args, code, answer):
    result = program.run(*args)
    assert result.code == code
    assert result.output.startswith(answer)


MODEL = "model: {class_path: tests.app.standin.Model"
DATA = "data: {class_path: tests.app.standin.Data"
OTHERS = "lightning.pytorch.demos.boring_classes"
MISTAKES = {
    "unknown top key": (RUN_FILE + "traner: {}\n", [], "unknown key traner; did you mean trainer?"),
    "unknown trainer key": (
        RUN_FILE.replace("devices", "devicse"),
        [],
        "unknown key trainer.devicse; did you mean devices?",
    ),
    "key of ours": (RUN_FILE, ["--trainer.max_epochs=2"], "trainer.max_epochs is not set here: "),
    "key of ours in the file": (
        RUN_FILE.replace("devices: 1", "precision: bf16-true"),
        [],
        "run.yaml: trainer.precision is not set here: ",
    ),
    "unknown callback key": (
        RUN_FILE.replace("validation: {every_n_steps", "validation: {every_n_step"),
        [],
        "unknown key validation.every_n_step; did you mean every_n_steps?",
    ),
    "unknown model key": (
        RUN_FILE.replace(MODEL, MODEL + ", init_args: {widht: 8}"),
        [],
        "run.yaml: unknown key model.init_args.widht; did you mean width?",
    ),
    "unknown model option": (
        RUN_FILE,
        ["--model.init_args.widht=8"],
        "unknown key model.init_args.widht; did you mean width?",
    ),
    "unknown option": (RUN_FILE, ["--nmae", "x"], "unknown key nmae; did you mean name?"),
    "a seed out of range": (RUN_FILE, ["--seed_everything=-1"], "seed_everything: -1 must lie between"),
    "no steps": (RUN_FILE, ["--trainer.max_steps=0"], "trainer.max_steps: 0 trains nothing"),
    "a negative number of steps": (RUN_FILE, ["--trainer.max_steps=-5"], "trainer.max_steps: -5 trains nothing"),
    "no logging": (RUN_FILE, ["--trainer.log_every_n_steps=0"], "trainer.log_every_n_steps is 0: it counts"),
    "no root": (RUN_FILE, ["--trainer.default_root_dir=null"], "trainer.default_root_dir is empty; name a folder"),
    "no checkpoint named": (RUN_FILE, ["--ckpt_path="], "--ckpt_path is empty; name a checkpoint"),
    "no strategy": (RUN_FILE, ["--trainer.strategy="], "trainer.strategy: '' is none of ours; leave it out or say"),
    "no time": (RUN_FILE, ["--trainer.max_time=00:00:00:00"], "trainer.max_time: 0 trains nothing; give DD:HH:MM:SS"),
    "a time of another form": (RUN_FILE, ["--trainer.max_time=1h"], "trainer.max_time: 1h is no time; give DD:HH"),
    "machines without a launcher": (RUN_FILE, ["--trainer.num_nodes=2"], "trainer.num_nodes: 2 machines need torchrun"),
    "another time to sum gradients": (
        RUN_FILE,
        ["--trainer.strategy={class_path: app.strategies.ShardedStrategy, init_args: {gradient_sync: never}}"],
        "error: trainer.strategy: gradient_sync 'never' must be last or every",
    ),
    "unknown key of an extra callback": (
        RUN_FILE.replace(
            "devices: 1",
            "callbacks: [{class_path: lightning.pytorch.callbacks.LambdaCallback, init_args: {on_fit_sart: null}}]",
        ),
        [],
        "unknown key trainer.callbacks[0].init_args.on_fit_sart; did you mean on_fit_start?",
    ),
    "stray argument": (RUN_FILE, ["stray"], "unrecognized arguments: stray (options start with --"),
    "wrong type": (RUN_FILE, ["--model.init_args.width=wide"], "model.init_args.width: expected int, got wide"),
    "wrong type in the file": (
        RUN_FILE.replace(DATA, DATA + ", init_args: {steps: many}"),
        [],
        "data.init_args.steps: expected int, got many",
    ),
    "value refused by the model": (RUN_FILE, ["--model.init_args.width=0"], "model.init_args.width is 0"),
    "value refused by a callback": (RUN_FILE, ["--console.every_n_steps=0"], "console.every_n_steps is 0"),
    "module that is not there": (
        RUN_FILE.replace("tests.app.standin.Model", "nowhere.Model"),
        [],
        "model: Problem with given class_path 'nowhere.Model': No module named 'nowhere'",
    ),
    "class that is not there": (
        RUN_FILE.replace("standin.Model", "standin.Modell"),
        [],
        "model: Problem with given class_path 'tests.app.standin.Modell': ",
    ),
    "no LightningModule": (
        RUN_FILE.replace("standin.Model", "standin.Rows"),
        [],
        "model: Import path tests.app.standin.Rows does not correspond to a subclass of LightningModule",
    ),
    "no LightningDataModule": (
        RUN_FILE.replace("standin.Data", "standin.Model"),
        [],
        "data: Import path tests.app.standin.Model does not correspond to a subclass of LightningDataModule",
    ),
    "another's LightningModule": (
        RUN_FILE.replace("tests.app.standin.Model", f"{OTHERS}.BoringModel"),
        [],
        f"model: {OTHERS}.BoringModel is no StageModule",
    ),
    "another's LightningDataModule": (
        RUN_FILE.replace("tests.app.standin.Data", f"{OTHERS}.BoringDataModule"),
        [],
        f"data: {OTHERS}.BoringDataModule is no StageData",
    ),
    "no model": (RUN_FILE.replace(MODEL + "}\n", ""), [], "run.yaml: missing key model"),
    "broken YAML": (RUN_FILE.replace("name: run", "name: run: x"), [], "run.yaml, line 1, column 10: not valid YAML: "),
    "no mapping": ("just text\n", [], "run.yaml: --config takes a file of `key: value` lines"),
    "bad name": (RUN_FILE, ["--name=a/b"], "name: 'a/b' is no folder name"),
    "strategy of others": (RUN_FILE, ["--trainer.strategy=ddp"], "trainer.strategy: ddp is none of ours"),
    "unknown accelerator": (
        RUN_FILE,
        ["--trainer.accelerator=gpux"],
        "trainer.accelerator: gpux is none of auto, cpu, gpu, cuda",
    ),
    "no GPU": (RUN_FILE, ["--trainer.accelerator=gpu"], "trainer.accelerator: gpu, but this machine has no GPU"),
    "no device": (RUN_FILE, ["--trainer.devices=0"], "trainer.devices: 0 must be at least 1, or auto"),
    "no number of devices": (RUN_FILE, ["--trainer.devices=many"], "trainer.devices: many is no number of processes"),
    "a logger without its folder": (
        RUN_FILE,
        ["--trainer.logger=lightning.pytorch.loggers.CSVLogger"],
        "error: missing key trainer.logger.init_args.save_dir, which lightning.pytorch.loggers.CSVLogger needs; add "
        "--trainer.logger.init_args.save_dir VALUE",
    ),
    "a callback without its metric": (
        RUN_FILE,
        ["--trainer.callbacks=EarlyStopping"],
        "error: missing key trainer.callbacks.init_args.monitor, which EarlyStopping needs",
    ),
    "a misspelt callback": (
        RUN_FILE,
        ["--trainer.callbacks=ErlyStopping"],
        "trainer.callbacks: ErlyStopping is no class that can be imported, such as lightning.pytorch.callbacks.",
    ),
    "a package that is not installed": (
        RUN_FILE,
        ["--trainer.logger=tests.app.standin.NeedsPackage"],
        "trainer: a package is missing: No module named 'no_such_package'",
    ),
    "missing data file": (RUN_FILE, ["--data.init_args.missing=/nowhere/x"], "/nowhere/x: No such file or directory"),
    "no checkpoint folder": (RUN_FILE, ["--trainer.default_root_dir=/proc/nowhere"], "/proc/nowhere: No such file"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_costs_one_line(program: Program, tmp_path: Path, mistake: str):
    text, options, answer = MISTAKES[mistake]
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    result = program.run("fit", f"--config={file}", f"--trainer.default_root_dir={tmp_path}", *options)
    assert result.code == 2, result.output
    lines = result.output.splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    assert len(errors) == 1, result.output
    assert len(lines) - errors[0] <= 3, result.output
    assert answer in lines[errors[0]]
    assert not ANSI_OR_TRACE.search(result.output)


def test_a_defect_keeps_its_traceback(program: Program, tmp_path: Path, run_file: Path):
    result = program.run(
        "fit", f"--config={run_file}", f"--trainer.default_root_dir={tmp_path}", "--model.init_args.fail_at=2"
    )
    assert result.code == 1
    assert "Traceback" in result.output
    assert "RuntimeError: a defect" in result.output


def test_what_is_about_to_happen_is_said_first(program: Program, tmp_path: Path, run_file: Path):
    common = [f"--config={run_file}", f"--trainer.default_root_dir={tmp_path}"]
    result = program.run("fit", *common, "--trainer.max_steps=1")
    assert result.code == 0, result.output
    assert result.output.splitlines()[0] == f"fit {run_file} ({tmp_path}/run): loading ..."
    last = result.output.splitlines()[-1]
    assert last == f"curves: python -m app.tensorboard --logdir {tmp_path}/run"
    printed = program.run("test", *common)
    assert f"{tmp_path}/run/checkpoints/step=00000001: test after step 1: loss " in printed.unfolded
    assert "loading" not in program.run("fit", *common, "--print_config").output


def test_versions_and_help_of_a_command(program: Program):
    result = program.run("--version")
    assert result.code == 0
    assert re.fullmatch(r"superbolt \S+ \(torch \S+, lightning \S+, Python 3\.\d+\.\d+\)\n", result.output)
    assert program.run("help", "merge").output == program.run("merge", "--help").output
    assert program.run("-h").output == program.run("help").output


def test_help_of_fit_names_the_classes_of_the_project_and_their_keys(program: Program):
    result = program.run("fit", "--help")
    text = " ".join(result.output.split())
    assert "ours: modules.pretraining.Pretraining, modules.sft.SFT." in text
    for key, meaning in (
        ("--model.init_args.optimizer.learning_rate LEARNING_RATE", "Peak learning rate; > 0. (required, type: float)"),
        ("--model.init_args.backbone.hidden_size HIDDEN_SIZE", "Width D of the residual stream."),
        ("--data.init_args.total_tokens TOTAL_TOKENS", "(type: int, default: 4000000)"),
    ):
        assert meaning in text.partition(key)[2][:400], key
    assert not re.search(r"DDP|DeepSpeed|XLA|FSDPStrategy|ModelParallel", text)


def test_evaluation_without_a_checkpoint_says_so(program: Program, tmp_path: Path, run_file: Path):
    common = [f"--config={run_file}", f"--trainer.default_root_dir={tmp_path}"]
    result = program.run("validate", *common)
    assert (result.code, result.output.splitlines()[-1].startswith("error: ")) == (2, True)
    assert "holds no checkpoint: run fit first" in result.output
    result = program.run("validate", *common, f"--ckpt_path={tmp_path}")
    assert (result.code, "is no complete checkpoint" in result.output) == (2, True)


def test_full_disk_keeps_the_checkpoints_that_are_there(program: Program, tmp_path: Path, run_file: Path):
    """A limit on the size of a file stands in for the full disk: the same error comes from the same calls."""
    common = ["fit", f"--config={run_file}", f"--trainer.default_root_dir={tmp_path}"]
    assert program.run(*common, "--trainer.max_steps=3").code == 0
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)); from app.__main__ import main; sys.exit(main())"
    )
    result = python("-c", code, *common)
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "step=00000006: File too large; make room" in result.stderr.splitlines()[-1]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step=00000003"]
    assert program.run(*common).code == 0


def test_the_module_and_the_console_script_are_the_same_program():
    assert python("-m", "app", "--help").stdout.startswith(f"usage: {sys.executable} -m app COMMAND")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["scripts"] == {"superbolt": "app.__main__:main"}
