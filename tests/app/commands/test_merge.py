"""`merge` as a user starts it."""

from pathlib import Path

import pytest
import torch

from app.__main__ import main
from datamodules.tokenizer import Tokenizer
from tests.app.commands.helpers import refusal, run_tensors, write_run
from tests.modules.checkpoints.folders import stored_tensors, write_hf_folder
from tests.modules.helpers import make_network, tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "small")


def test_merge_takes_weights(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    models = [run / "checkpoints" / "step=00000010", run]
    assert main(["merge", *map(str, models), "--output", str(tmp_path / "m"), "--weights", "3", "1"]) == 0
    printed = capsys.readouterr().out
    assert "0.750000  small, step 10\n0.250000  small, step 40\n" in printed
    found, first, last = stored_tensors(tmp_path / "m"), run_tensors(0), run_tensors(2)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 0.75 * first[name] + 0.25 * last[name])


def test_merge_without_weights_is_the_mean(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    models = [str(run / "checkpoints" / f"step={step:08d}") for step in (10, 12)]
    assert main(["merge", *models, "--output", str(tmp_path / "m")]) == 0
    assert capsys.readouterr().out.startswith("0.500000  small, step 10\n0.500000  small, step 12\n")


def test_merge_emulates_a_decay(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    models = [str(run / "checkpoints" / f"step={step:08d}") for step in (10, 12, 40)]
    assert main(["merge", *models, "--output", str(tmp_path / "m"), "--decay", "minus_sqrt", "--minimum_ratio=0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"note: {models[2]}, step 40: the learning rate was at 0.01 of its peak"), (
        "it decays itself"
    )
    early = sum(1 - (update / 30) ** 0.5 for update in (1, 2)) / 2
    late = sum(1 - (update / 30) ** 0.5 for update in range(3, 31)) / 28
    weights = [float(line.split()[0]) for line in lines[1:4]]
    assert weights == pytest.approx([1 - early, early - late, late], abs=1e-6)
    card = (tmp_path / "m" / "README.md").read_text()
    assert "minus-sqrt decay of the learning rate to 0 of its peak over the 30 steps from 10 to 40" in card


def test_mistakes_of_merge_cost_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    early, late = (run / "checkpoints" / f"step={step:08d}" for step in (10, 12))
    foreign = write_hf_folder(tmp_path / "foreign", make_network(tiny_config(vocab_size=288)))
    other = write_hf_folder(tmp_path / "other", make_network(tiny_config()))
    output, decay = ("--output", tmp_path / "m"), ("--decay", "minus_sqrt")
    assert "2 given for 1 MODELs" in refusal(capsys, "merge", early, *output, "--weights", 1, 2)
    assert "leave one of the two out" in refusal(capsys, "merge", early, late, *output, *decay, "--weights", 1, 2)
    assert "each later than the one before" in refusal(capsys, "merge", late, early, *output, *decay)
    assert "give --steps" in refusal(capsys, "merge", early, foreign, *output, *decay)
    assert "1 given for 2 MODELs" in refusal(capsys, "merge", early, foreign, *output, *decay, "--steps", 1)
    assert "only --decay needs them" in refusal(capsys, "merge", early, foreign, *output, "--steps", 1, 2)
    assert "vocab_size 288 and 64" in refusal(capsys, "merge", early, other, *output)
    assert "must lie in [0, 1]" in refusal(capsys, "merge", early, late, *output, *decay, "--minimum_ratio", 2)
    assert not (tmp_path / "m").exists()
    assert main(["merge", str(early), str(foreign), "--output", str(tmp_path / "m"), *decay, "--steps", "1", "2"]) == 0


def test_merge_refuses_two_tokenizers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    network = make_network(tiny_config(vocab_size=300))
    models = [write_hf_folder(tmp_path / name, network) for name in "abc"]
    first, second = (Tokenizer.train([text], 300) for text in ("some text " * 9, "another matter " * 9))
    for model, tokenizer in zip(models, (first, second, first), strict=True):
        tokenizer.save(model)
    message = refusal(capsys, "merge", *models, "--output", tmp_path / "m")
    assert f"models: {models[1]} has another tokenizer than {models[0]}" in message
    assert not (tmp_path / "m").exists()
    assert main(["merge", str(models[0]), str(models[2]), "--output", str(tmp_path / "m")]) == 0
