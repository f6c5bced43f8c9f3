"""What is wrong with the command line of a run is found before anything slow is imported."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from app.run_keys import RunArguments, check_files, check_run, merge, stages
from modules.errors import UserError
from tests.app.helpers import ROOT

RUN_FILE = str(ROOT / "configs" / "pretrain.yaml")
CONFIG = ["--config", RUN_FILE]
MISTAKES = {
    "nothing": ([], "no run file: give one with --config FILE (configs/pretrain.yaml is an example)"),
    "a file without its option": (["a.yaml"], "a.yaml: a run file is given with --config a.yaml"),
    "a missing file": (["--config", "none.yaml"], "none.yaml: there is no such file (--config)"),
    "a folder": (["--config", "."], ". is a folder; --config takes a YAML file such as configs/pretrain.yaml"),
    "no value at the end": (["--config"], "--config needs a value: --config configs/pretrain.yaml"),
    "no value before an option": ([*CONFIG, "--name", "--seed_everything", "1"], "--name needs a value: --name VALUE"),
    "one dash": (["-config", RUN_FILE], "did you mean --config?"),
    "a key of another place": (
        [*CONFIG, "--learning_rate=1"],
        "unknown key learning_rate; did you mean model.init_args.optimizer.learning_rate?",
    ),
    "a misspelt key deep inside": (
        [*CONFIG, "--model.optimizer.learning_rat", "1"],
        "unknown key model.init_args.optimizer.learning_rat; did you mean learning_rate?",
    ),
    "a key before its class": (["--data.seed=1", *CONFIG], "data.init_args.seed: give it after --config"),
    "a key that follows from others": ([*CONFIG, "--trainer.precision=16"], "trainer.precision is not set here: "),
    "a value where keys belong": (
        [*CONFIG, "--model.precision=fp4"],
        "model.init_args.precision: there is no file fp4; give one, or keys below it (recipe, ",
    ),
    "a list where keys belong": ([*CONFIG, "--model.optimizer=[1]"], "model.init_args.optimizer is a list; it holds"),
    "a class that is not there": (
        [*CONFIG, "--model=modules.pretraining.Pretrainin"],
        "model.class_path: modules.pretraining.Pretrainin is no class path; known: modules.pretraining.Pretraining",
    ),
    "a corpus that is not there": (
        [*CONFIG, "--data.path=nowhere"],
        "data.init_args.path: nowhere does not exist; prepare it: python -m app prepare FILES --output nowhere",
    ),
    "a folder that is no corpus": ([*CONFIG, "--data.path=."], "data.init_args.path: . holds no corpus.json"),
    "one of several corpora": (
        [*CONFIG, "--data.sources={a: {path: nowhere}}"],
        "data.init_args.sources.a.path: nowhere does not exist",
    ),
    "a MODEL that is not there": (
        [*CONFIG, "--model.init_from=nowhere"],
        "model.init_args.init_from: nowhere does not exist; a MODEL is a folder",
    ),
    "a root that is a file": (
        [*CONFIG, "--trainer.default_root_dir=/dev/null"],
        "trainer.default_root_dir: /dev/null is no folder",
    ),
    "a misspelt --config": (["--cofig", RUN_FILE], "unknown key cofig; did you mean config?"),
    "a URL": (["--config", "https://x.org/a.yaml"], "--config: https://x.org/a.yaml is a URL; give a path of this"),
    "no name": ([*CONFIG, "--name="], "name: '' is no folder name; letters, digits, - and _ are safe"),
    "a name with a slash": ([*CONFIG, "--name=a/b"], "name: 'a/b' is no folder name"),
    "a long name": ([*CONFIG, f"--name={'a' * 256}"], "name: aaaaaaaaaaaaaaaaaaaa... is longer than 255 bytes"),
    "a value in place of a group": ([*CONFIG, "--validation=5"], "validation has 5 in place of keys: every_n_steps"),
    "a dataset of the Hub": (
        [*CONFIG, "--data.path=hf:a/b"],
        "data.init_args.path: hf:a/b does not exist; prepare it: python -m app prepare hf:a/b --output data/b",
    ),
    "texts in place of a corpus": (
        [*CONFIG, f"--data.path={ROOT / 'examples' / 'corpus'}"],
        f"prepare it: python -m app prepare {ROOT / 'examples' / 'corpus'} --output data/corpus",
    ),
    "a file in place of a corpus": (
        [*CONFIG, f"--data.path={RUN_FILE}"],
        f"is a file, and a corpus is a folder; prepare it: python -m app prepare {RUN_FILE} --output data/pretrain",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_key_and_mend(mistake: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, answer = MISTAKES[mistake]
    with pytest.raises(UserError) as caught:
        check_files(check_run(args, "fit"))
    assert answer in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (b"", "run.yaml: --config takes a file of `key: value` lines, this one holds nothing"),
        (b"- a\n", "this one holds a list"),
        (b"\xff\xfe\x00", "run.yaml is no text in UTF-8; --config takes a YAML file"),
        (b"a: [1\n", "run.yaml, line 2, column 1: not valid YAML: "),
        (b"model: {class_path: modules.pretraining.Pretraining}\n", "run.yaml: missing key data; "),
        (b"trainer: {devicse: 1}\n", "run.yaml: unknown key trainer.devicse; did you mean devices?"),
        (b"vocab_size: 8\n", "run.yaml: unknown key vocab_size"),
        (b"name: a\nname: b\n", "run.yaml, line 2, column 1: not valid YAML: the key name stands here a second time"),
        (b"trainer:\n\tdevices: 1\n", "run.yaml, line 2, column 1: not valid YAML: a tab; YAML is indented with"),
        (b"trainer: [1]\n", "run.yaml: trainer is a list; it holds keys: accelerator, "),
        (b"checkpoint:\n", "run.yaml: checkpoint has nothing in place of keys: every_n_steps, "),
        (
            b"model: {x: 1}\ndata: {x: 1}\n",
            "run.yaml: missing key model.class_path; known: modules.pretraining.Pretraining",
        ),
    ],
)
def test_a_file_that_is_no_run_file_is_named(content: bytes, answer: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        check_run(["--config", "run.yaml"], "fit")
    assert answer in str(caught.value)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_what_is_not_trained_cannot_be_evaluated(command: str, tmp_path: Path):
    root = f"--trainer.default_root_dir={tmp_path}"
    for args, answer in (
        ([root], f"{tmp_path}/pretrain/checkpoints holds no checkpoint: run fit first, "),
        ([root, "--ckpt_path=nowhere"], "--ckpt_path: nowhere does not exist"),
    ):
        with pytest.raises(UserError) as caught:
            check_files(check_run([*CONFIG, *args], command))
        assert answer in str(caught.value)


def test_a_model_may_be_gone_once_the_run_has_a_checkpoint(tmp_path: Path):
    (tmp_path / "pretrain" / "checkpoints" / "step=00000003").mkdir(parents=True)
    root = f"--trainer.default_root_dir={tmp_path}"
    check_files(check_run([*CONFIG, root, "--model.init_from=nowhere"], "fit"))


def test_a_name_is_a_text_whatever_it_looks_like():
    assert check_run([*CONFIG, "--name", "null"], "fit").get("name") == "null"


def test_a_flag_may_stand_alone():
    given = check_run([*CONFIG, "--model.activation_checkpointing", "--name", "x", "--mock_step.enabled"], "fit")
    assert given.args == [*CONFIG, "--model.activation_checkpointing=true", "--name", "x", "--mock_step.enabled=true"]
    assert given.get("model.init_args.activation_checkpointing") is True


def test_files_and_options_are_put_together_as_by_the_parser():
    layout = str(ROOT / "configs" / "layout" / "cpu2.yaml")
    args = [*CONFIG, "--config", layout, "--model.optimizer.learning_rate=1e-2", "--data.seed", "3", "--name=x"]
    from app.cli import parse_run

    given, parsed = RunArguments(args, "fit"), parse_run(args).config
    for key in ("name", "trainer.devices", "data.init_args.micro_batch_size", "data.init_args.seed"):
        assert given.get(key) == parsed[key], key
    assert float(given.get("model.init_args.optimizer.learning_rate")) == parsed.model.init_args.optimizer.learning_rate


def test_another_class_takes_none_of_the_arguments_of_the_one_before():
    tree = {"model": {"class_path": "a.B", "init_args": {"x": 1}}}
    merge(tree, {"model": {"class_path": "a.C", "init_args": {"y": 2}}})
    assert tree == {"model": {"class_path": "a.C", "init_args": {"y": 2}}}


def test_the_classes_of_this_project_are_found():
    used = yaml.safe_load(Path(RUN_FILE).read_text(encoding="utf-8"))
    assert used["model"]["class_path"] in stages("model")
    assert used["data"]["class_path"] in stages("data")


def test_nothing_slow_is_imported_before():
    code = (
        "import sys\nfrom app.__main__ import main\n"
        f"assert main(['fit', '--config', {RUN_FILE!r}, '--data.path', 'nowhere']) == 2\n"
        "assert main(['generate', 'nowhere', '--prompt', 'x']) == 2\n"
        "assert main(['fit', '--config', 'nowhere.yaml']) == 2\n"
        "print(sorted({'torch', 'lightning', 'transformers', 'datasets', 'litdata'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout == "[]\n", result.stderr
