"""Data of another tokenizer than the weights are refused by the real program; held-out rows are scored as validated."""

import re
from pathlib import Path

import pytest

from datamodules.text.preparation import Preparation, prepare_corpus
from tests.app.helpers import Program
from tests.app.test_real_run import make_run_file


@pytest.fixture(scope="module")
def run(program: Program, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], Path]:
    """A folder with a run of two steps, the options of its command, and the same text with another tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    file = make_run_file(folder, steps=6)
    file.write_text(file.read_text().replace("recipe: super", "recipe: fp32"))
    options = [
        f"--config={file}",
        f"--trainer.default_root_dir={folder}",
        "--mock_step.enabled=false",
        "--trainer.max_steps=2",
    ]
    result = program.run("fit", *options)
    assert result.code == 0, result.output
    texts = {"sequence_length": 64, "vocab_size": 290, "validation_fraction": 0.2, "workers": 1}
    prepare_corpus(Preparation(paths=[str(folder / "texts")], output=folder / "other", **texts))
    return folder, options, folder / "other"


def refusal(program: Program, *args: str) -> str:
    result = program.run(*args)
    assert result.code == 2, result.output
    *_, line = result.output.splitlines()
    assert "Traceback" not in result.output
    return line


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_a_run_on_data_of_another_tokenizer_is_refused(program, run, command):
    folder, options, other = run
    checkpoint = folder / "run" / "checkpoints" / "step=00000002"
    more = [f"--data.init_args.path={other}"]
    more += [f"--ckpt_path={checkpoint}"] if command == "test" else []
    assert refusal(program, command, *options, *more) == (
        f"error: data.init_args.path: {other} has another tokenizer than {checkpoint}, to which ids mean other text; "
        f"prepare the text with --tokenizer {checkpoint} and another --output"
    )


def test_starting_from_a_model_of_another_tokenizer_must_be_asked_for(program, run):
    folder, options, other = run
    more = ["--name=started", f"--model.init_args.init_from={folder / 'run'}", "--trainer.max_steps=1"]
    line = refusal(program, "fit", *options, *more, f"--data.init_args.path={other}")
    checkpoint = folder / "run" / "checkpoints" / "step=00000002"
    problem = f"data.init_args.path: {other} has another tokenizer than {checkpoint}, "
    assert line.startswith(f"error: {problem}")
    assert line.endswith(", or set model.init_args.allow_other_tokenizer to true")
    allowed = "--model.init_args.allow_other_tokenizer=true"
    result = program.run("fit", *options, *more, f"--data.init_args.path={other}", allowed)
    assert result.code == 0, result.output
    assert f"weights     warning: {problem}" in result.unfolded
    assert "same order" not in result.output


@pytest.mark.parametrize("seed", [0, 1])
def test_starting_on_the_same_data_says_so_and_another_seed_does_not(program, run, seed):
    folder, options, _ = run
    more = [f"--name=again{seed}", f"--model.init_args.init_from={folder / 'run'}", "--trainer.max_steps=1"]
    result = program.run("fit", *options, *more, f"--data.init_args.seed={seed}")
    assert result.code == 0, result.output
    assert ("the same rows come in the same order again; another data.init_args.seed" in result.unfolded) is (seed == 0)


@pytest.mark.parametrize("rows", [None, 4])
def test_held_out_rows_are_scored_as_validated(program, run, rows):
    folder, options, _ = run
    validated = program.run("validate", *options, f"--data.init_args.validation_rows={rows or 'null'}").unfolded
    [loss, bits] = map(float, re.findall(r"(?:loss|bits per byte) ([\d.]+)", validated))
    more = [f"--validation_rows={rows}"] if rows else []
    scored = program.run("score", str(folder / "run"), "--data", str(folder / "corpus"), *more).output
    [nll, scored_bits] = map(float, re.findall(r"(?:mean nll|bits per byte) ([\d.]+)", scored))
    assert (nll, scored_bits) == pytest.approx((loss, bits), abs=1.01e-4), "both are rounded to 4 digits"
