"""What `plan` prints, and what a mistake costs."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from app.__main__ import main
from app.cli import parse_run
from modules.checkpoints import folder

ROOT = Path(__file__).parent.parent.parent.parent
PRETRAIN = ROOT / "configs" / "pretrain"


def test_the_plan_of_super(capsys: pytest.CaptureFixture[str]):
    code = main(
        ["plan", "--config", str(PRETRAIN / "super.yaml"), "--config", str(PRETRAIN.parent / "layout" / "gpu8.yaml")]
    )
    printed = capsys.readouterr().out
    assert code == 0
    assert "with MTP           123,611,012,096 (123,611,033,088)" in printed
    assert "without MTP        120,668,687,360 (120,668,707,840)" in printed
    assert "active per token   12,770,216,960 (10.6%)" in printed
    assert re.search(r"backbone\.layers\.\*\.mixer\.experts\.up_proj +(nvfp4 +){3}\w+ +33 +14\.6% +\*\n", printed)
    assert re.search(r"backbone\.layers\.\*\.mixer\.experts\.up_proj +(bf16 +){3}torch +7 +3\.1% +bf16_tail\n", printed)
    assert re.search(r"warm-up +200,000,000,000 +7,947 ", printed)
    assert re.search(r"decay +5,000,000,000,000 +198,682 +0\.00045 to 4\.5e-06", printed)
    assert re.search(r"MoE routed experts +nvfp4, bf16 +29\.0665 +32\.9% +9\.6888 +37\.7%", printed)
    assert re.search(r"all +88\.2482 +25\.7027", printed)
    assert "8 GPUs, micro-batches of 1 x 8,192 positions, 384 in a step; activation checkpointing on" in printed
    assert re.search(r"weights, fp32 +57\.5\d\d +57\.5\d\d\n", printed), "an eighth of 460.5 GiB"
    assert "0.00045 |***" in printed
    assert "no speed is known: runs/super has not been trained" in printed


def small_run(tmp_path: Path, **changes: Any) -> str:
    """The tiny run with its folder in `tmp_path`, smaller still."""
    tree = yaml.safe_load((ROOT / "configs" / "pretrain.yaml").read_text(encoding="utf-8"))
    tree["model"]["init_args"]["backbone"] |= {"hybrid_override_pattern": "ME*", "vocab_size": 512}
    tree["data"]["init_args"] |= {"sequence_length": 64, "global_batch_size": 8, "micro_batch_size": 2}
    tree["trainer"] |= {"default_root_dir": str(tmp_path), **changes}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return str(file)


def planned(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["plan", *args]) == 0
    return capsys.readouterr().out


def test_the_plan_of_one_process_shows_it_without_fsdp2_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    printed = planned(capsys, "--config", small_run(tmp_path, accelerator="cpu"))
    assert "1 CPU process, micro-batches of 2 x 64 positions, 4 in a step; activation checkpointing off" in printed
    assert re.search(r"[MK]iB +this run +checkpointing on +without FSDP2\n", printed)
    rows = [line.rsplit(maxsplit=3) for line in printed.splitlines()]
    values = {row[0]: [float(cell.replace(",", "")) for cell in row[1:]] for row in rows if row and "peak" in row[0]}
    kept = next(row for row in rows if row and row[0].startswith("activations kept"))
    assert float(kept[2]) < 0.5 * float(kept[1]), "recomputation keeps less"
    assert values["peak of a step"][1] < values["peak of a step"][0]


def test_devices_and_their_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = small_run(tmp_path, accelerator="cpu", devices=2)
    assert "2 CPU processes, micro-batches of 2 x 64 positions, 2 in a step" in planned(capsys, "--config", file)
    printed = planned(capsys, "--config", file, "--devices", "4", "--accelerator", "gpu", "--tokens_per_second", "1000")
    assert "4 GPUs, micro-batches of 2 x 64 positions, 1 in a step" in printed
    assert "4 minutes 10 seconds, validation and checkpoints left out; 0.28 device hours" in printed
    assert re.search(r"at 4,000 tokens/s, .* per device \(stated\)", printed)


def test_keys_on_the_command_line_count_as_in_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file, overlay = small_run(tmp_path, accelerator="cpu"), tmp_path / "overlay.yaml"
    overlay.write_text("data: {init_args: {micro_batch_size: 4}}\nname: other\n", encoding="utf-8")
    expected = planned(capsys, "--config", file, "--config", str(overlay))
    assert "Parameters of other" in expected
    assert "1 CPU process, micro-batches of 4 x 64 positions, 2 in a step" in expected
    keys = ["--data.init_args.micro_batch_size=4", "--name", "other"]
    assert planned(capsys, "--config", file, *keys) == expected
    options = ["--devices=2", "-c", file, "--data.micro_batch_size=1", "--config", str(overlay), "--accelerator", "gpu"]
    printed = planned(capsys, *options)
    assert "Parameters of other" in printed, "the last counts"
    assert "2 GPUs, micro-batches of 4 x 64 positions, 1 in a step" in printed


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--config"],
        ["stray"],
        ["--config", "RUN", "stray"],
        ["--config", "RUN", "--nmae=x"],
        ["--config", "RUN", "--data.micro_batch_sise", "4"],
        ["--config", "RUN", "--trainer.max_epochs=2"],
        ["--config", "RUN", "--model.init_args.mtp_depths=two"],
    ],
)
def test_keys_are_refused_as_by_fit(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    given = [small_run(tmp_path) if argument == "RUN" else argument for argument in arguments]
    answers = []
    for command in ("fit", "plan", "inspect"):
        assert main([command, *given]) == 2
        answers.append(capsys.readouterr().err.splitlines()[-1])
    assert answers[0].startswith("error: ")
    assert answers[1:] == answers[:1] * 2


def test_more_devices_than_experts_are_remarked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = small_run(tmp_path, accelerator="gpu")
    text = (tmp_path / "run.yaml").read_text(encoding="utf-8").replace("global_batch_size: 8", "global_batch_size: 256")
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    assert "is padding" not in planned(capsys, "--config", file, "--devices", "4")
    assert re.search(r"\d\d% of the shards is padding", planned(capsys, "--config", file, "--devices", "128"))


def test_time_from_a_share_of_the_peak(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    printed = planned(capsys, "--config", small_run(tmp_path), "--mfu", "0.5", "--peak_tflops", "0.2")
    assert re.search(r"at .* tokens/s, 100 GFLOP/s per device \(0.5 of 0.2 TFLOP/s, stated\)", printed)


def trained_run(tmp_path: Path, **changes: Any) -> str:
    """A run file, and what training it left behind: the configuration and a speed of 2,000 tokens/s."""
    file = small_run(tmp_path, **changes)
    run = parse_run(["--config", file])
    run.run_folder.save_config(run.config_text())
    with SummaryWriter(str(run.run_folder.path)) as writer:
        for step, speed in enumerate([100.0, 2000.0, 2000.0, 2000.0, 9000.0]):
            writer.add_scalar("training/tokens_per_second", speed, step)
    return file


def checkpointed_on(tmp_path: Path, step: int, devices: int) -> None:
    target = tmp_path / "pretrain" / "checkpoints" / f"step={step:08}"
    folder.begin(target)
    folder.publish(target, {"step": step, "devices": devices})


def test_time_from_what_the_run_has_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    printed = planned(capsys, "--config", trained_run(tmp_path, devices=1))
    assert "8 minutes 20 seconds, validation" in printed
    assert f"(measured on 1 device in {tmp_path / 'pretrain'})" in printed


def test_a_measured_speed_is_that_of_the_devices_it_was_measured_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = trained_run(tmp_path, devices="auto")
    assert "does not say on how many devices its speed was measured" in planned(capsys, "--config", file)
    checkpointed_on(tmp_path, 10, 1)
    checkpointed_on(tmp_path, 20, 4)
    printed = planned(capsys, "--config", file, "--devices", "2")
    assert "at 1,000 tokens/s" in printed
    assert f"(measured on 4 devices in {tmp_path / 'pretrain'}, taken times devices)" in printed
    assert "16 minutes 40 seconds, validation" in printed
    (tmp_path / "pretrain" / "checkpoints" / "step=00000020" / "checkpoint.json").unlink()
    assert "at 4,000 tokens/s" in planned(capsys, "--config", file, "--devices", "2"), "a damaged one is passed over"


@pytest.mark.parametrize(
    ("part", "change", "key"),
    [
        ("data", {"sequence_length": 128}, "data.init_args.sequence_length"),
        ("model", {"precision": {"recipe": "bf16"}}, "model.init_args.precision"),
        ("backbone", {"hidden_size": 64}, "model.init_args.backbone"),
        ("model", {"mtp_depths": 1}, "model.init_args.mtp_depths"),
    ],
)
def test_the_speed_of_other_work_is_not_used(
    part: str, change: dict[str, Any], key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = Path(trained_run(tmp_path, devices=1))
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    arguments = tree["data" if part == "data" else "model"]["init_args"]
    (arguments["backbone"] if part == "backbone" else arguments).update(change)
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    printed = planned(capsys, "--config", str(file))
    assert f"no speed is known: that of {tmp_path / 'pretrain'} was measured with another {key}\n" in printed


@pytest.mark.parametrize("given", ["auto", -1, "-1"])
def test_devices_that_are_not_counted_are_assumed(given: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = small_run(tmp_path, devices=given, num_nodes=2, accelerator="gpu")
    printed = planned(capsys, "--config", file)
    assert f"1 device assumed in each of 2 machines (trainer.devices: {given}); give --devices" in printed
    assert "\n2 GPUs, micro-batches" in printed
    assert "assumed" not in planned(capsys, "--config", file, "--devices", "1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "0"], "--devices: 0 must be positive"),
        (["--devices", "3"], "data.init_args.global_batch_size: 8 rows a step do not divide among 3 devices"),
        (["--mfu", "0.4"], "--mfu and --peak_tflops go together"),
        (["--mfu", "40", "--peak_tflops", "989"], "--mfu: 40.0 is a share of the peak"),
        (["--mfu", "0.4", "--peak_tflops", "989", "--tokens_per_second", "5"], "--tokens_per_second"),
        (["--accelerator", "tpu"], "--accelerator"),
        (["--devcies=2"], "unknown option --devcies, did you mean --devices?"),
    ],
)
def test_a_wrong_option_costs_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["plan", "--config", small_run(tmp_path), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "x"}, "model"),
        ({"schedule": {"warmup_tokens": 30_000_000_000_000}}, "model.init_args.schedule"),
        ({"backbone": "../model/missing.yaml"}, "missing.yaml"),
        ({"mtp_depths": 0}, "model.init_args.mtp_depths"),
        ({"mtp_dephts": 2}, "mtp_depths"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_mistake_costs_one_line(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tree = yaml.safe_load((PRETRAIN / "super.yaml").read_text(encoding="utf-8"))
    tree["model"]["init_args"]["backbone"] = str(ROOT / "configs" / "model" / "super.yaml")
    if "model" in change:
        tree |= change
    else:
        tree["model"]["init_args"] |= change
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert main(["plan", "--config", str(file)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_a_missing_file_is_named(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--config", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "error: nowhere.yaml: there is no such file (--config)\n"
