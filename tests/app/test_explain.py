"""What the real parsers of run files and commands answer to a mistake: the whole key and the reason, in one line."""

from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from app.cli import RunCLI
from app.command_line import build_parser
from modules.errors import UserError

TREE: dict[str, Any] = {
    "model": {
        "class_path": "modules.pretraining.Pretraining",
        "init_args": {
            "backbone": {"vocab_size": 8, "hidden_size": 8, "hybrid_override_pattern": "-"},
            "optimizer": {"learning_rate": 1},
        },
    },
    "data": {"class_path": "datamodules.pretraining.PretrainingData", "init_args": {"path": "nowhere"}},
}
STOPPING = "lightning.pytorch.callbacks.EarlyStopping"


def answer(folder: Path, tree: dict[str, Any], *args: str) -> str:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        RunCLI([f"--config={file}", *args])
    return str(caught.value).replace(f"{folder}/", "")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("--trainer.max_steps=abc", "trainer.max_steps: expected int, got abc"),
        ("--trainer.limit_val_batches=many", "trainer.limit_val_batches: expected int or float or null, got many"),
        ("--model.init_args.mtp_depths=two", "model.init_args.mtp_depths: expected int, got two"),
        ("--model.mtp_depths two", "model.init_args.mtp_depths: expected int, got two"),
        (
            "--model.init_args.precision.recipe=foo",
            "model.init_args.precision.recipe: expected one of super, bf16, fp32 or null, got foo",
        ),
        (
            "--model.init_args.spike_guard.window=wide",
            "model.init_args.spike_guard.window: expected int, got wide",
        ),
        (
            "--model.init_args.optimizer.betas=[0.9]",
            "model.init_args.optimizer.betas: expected tuple with 2 elements, got [0.9]",
        ),
        ("--model.init_args.mtp_dephts=2", "unknown key model.init_args.mtp_dephts; did you mean mtp_depths?"),
        ("--model.optimizer.betsa=1", "unknown key model.init_args.optimizer.betsa; did you mean betas?"),
        ("--model.spike_guard.sigma=1", "unknown key model.init_args.spike_guard.sigma; did you mean sigmas?"),
        ("--nmae=x", "unknown key nmae; did you mean name?"),
        ("-name=x", "unrecognized arguments: -name=x (options start with --"),
        ("--trainer.max_epochs 2", "trainer.max_epochs is not set here: the whole run is one epoch"),
        ("stray", "unrecognized arguments: stray (options start with --"),
        ("--model=foo", "model.class_path: foo is no class path; known: modules.pretraining.Pretraining"),
        ("--model=nowhere.Model", "model: Problem with given class_path 'nowhere.Model': No module named 'nowhere'"),
        ("--model=yaml.Model", "model: Problem with given class_path 'yaml.Model': module 'yaml' has no attribute"),
        ("--model=yaml.Loader", "model: Import path yaml.Loader does not correspond to a subclass of LightningModule"),
        ("--model=[1]", "model.class_path: [1] is no class path; known: "),
        ("--model=null", "run.yaml: missing key model"),
        (
            "--model.init_args.backbone=nowhere.yaml",
            "model.init_args.backbone: there is no file nowhere.yaml; give one, or keys below it (vocab_size, ",
        ),
        ("--config", "--config needs a value: --config configs/pretrain.yaml"),
    ],
)
def test_an_argument_that_is_refused(args: str, expected: str, tmp_path: Path):
    assert answer(tmp_path, TREE, *args.split()).startswith(expected)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"trainer": {"max_steps": "abc"}}, "trainer.max_steps: expected int, got abc"),
        (
            {"model": {"class_path": "modules.pretraining.Pretraining"}},
            "run.yaml: missing key model.init_args.backbone.vocab_size, model.init_args.backbone.hidden_size, ",
        ),
        (
            {"trainer": {"callbacks": [{"class_path": STOPPING, "init_args": {"monitor": "x", "patience": "p"}}]}},
            "trainer.callbacks.init_args.patience: expected int, got p",
        ),
        (
            {"trainer": {"callbacks": [{"class_path": STOPPING}]}},
            "run.yaml: missing key trainer.callbacks.init_args.monitor",
        ),
        ({"trainer": {"callbacks": [{"class_path": "a.B"}]}}, "trainer.callbacks: Problem with given class_path 'a.B'"),
    ],
)
def test_a_run_file_that_is_refused(change: dict[str, Any], expected: str, tmp_path: Path):
    assert answer(tmp_path, TREE | change).startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hiden_size: 3", "part.yaml: unknown key model.init_args.backbone.hiden_size; did you mean hidden_size?"),
        ("hidden_size: many", "model.init_args.backbone.hidden_size: expected int, got many"),
        ("a: b: c", "part.yaml, line 1, column 5: not valid YAML: mapping values are not allowed"),
    ],
)
def test_a_file_of_a_part_that_is_refused(text: str, expected: str, tmp_path: Path):
    (tmp_path / "part.yaml").write_text(text, encoding="utf-8")
    assert answer(tmp_path, TREE, f"--model.init_args.backbone={tmp_path}/part.yaml").startswith(expected)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("x --share=half", "--share: expected float or null, got half"),
        ("x --kind=c", "--kind: expected one of a, b, got c"),
        ("x --knid=a", "unknown option --knid, did you mean --kind?"),
        ("x --zzz", "unknown option --zzz"),
        ("x y", "unrecognized arguments: y"),
        ("x --kind", "--kind needs a value"),
    ],
)
def test_the_argument_of_a_command_that_is_refused(args: str, expected: str):
    def wrap(folder: Path, *, kind: Literal["a", "b"] = "a", share: float | None = None) -> None:
        """Wrap."""

    with pytest.raises(UserError) as caught:
        build_parser("wrap", wrap).parse_args(args.split())
    assert str(caught.value) == f"{expected}; see python -m app wrap --help"


def test_an_argument_that_is_missing_is_explained():
    def wrap(folder: Path, *, kind: str) -> None:
        """Wrap.

        Args:
            folder: Folder to wrap. Any will do.
            kind: How.

        Example:
            python -m app wrap x --kind a
        """

    for args, meaning in (([], "FOLDER: Folder to wrap"), (["x"], "--kind: How")):
        with pytest.raises(UserError, match=f"^missing {meaning}; for example python -m app wrap x --kind a$"):
            build_parser("wrap", wrap).parse_args(args)
