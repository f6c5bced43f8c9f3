"""What `plan` prints, and what a mistake costs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from app.__main__ import main
from app.cli import parse_run
from callbacks.peak import Peak
from modules.checkpoints import folder

ROOT = Path(__file__).parent.parent.parent.parent
PRETRAIN = ROOT / "configs" / "pretrain"
TORCHAO = '[{pattern: "*layers*", format: fp8}]'
WIDE = {
    "super": ["--config=configs/pretrain/super.yaml", "--config=configs/layout/gpu8x64.yaml", "--device=b200"],
    "ultra": ["--config=configs/pretrain/ultra.yaml", "--config=configs/layout/gpu8x64.yaml"],
    "nano": ["--config=configs/pretrain/nano.yaml", "--config=configs/layout/gpu8.yaml", "--mfu=0.3"],
    "tiny": ["--config=configs/pretrain.yaml"],
    "nvfp4": ["--config=configs/pretrain_nvfp4.yaml", "--data.init_args.global_batch_size=1000000"],
}


def test_the_plan_of_super(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("app.planning.report.fitting_devices", lambda *_: None)  # takes as long as all the rest
    code = main(
        ["plan", "--config", str(PRETRAIN / "super.yaml"), "--config", str(PRETRAIN.parent / "layout" / "gpu8.yaml")]
    )
    printed = capsys.readouterr().out
    assert code == 0
    assert "with MTP           123,611,012,096 (123,611,033,088)" in printed
    assert "without MTP        120,668,687,360 (120,668,707,840)" in printed
    assert "active per token   12,770,216,960 (10.6%)" in printed
    assert re.search(
        r"\n\*\n(  .*\n)*  backbone\.layers\.\*\.mixer\.experts\.up_proj +nvfp4 +emulated +33 +14\.6%\n", printed
    )
    assert re.search(r"\nbf16_tail\n  backbone\.layers\.\*\.mixer\.experts\.up_proj +bf16 +torch +7 +3\.1%\n", printed)
    assert re.search(r"warm-up +200,000,000,000 +7,947 ", printed)
    assert re.search(r"decay +5,000,000,000,000 +198,682 +0\.00045 to 4\.5e-06", printed)
    assert re.search(r"MoE routed experts +nvfp4, bf16 +29\.0665 +32\.9% +9\.6888 +37\.7%", printed)
    assert re.search(r"all +88\.2482 +25\.7027", printed)
    assert "8 GPUs, micro-batches of 1 x 8,192 positions, 384 in a step; activation checkpointing on" in printed
    assert re.search(r"weights, fp32 +57\.5\d\d +57\.5\d\d\n", printed), "an eighth of 460.5 GiB"
    assert "0.00045 |***" in printed
    assert printed.startswith("super on 8 x H100: DOES NOT FIT, ")
    assert "H100 assumed, as no GPU is here; name another with --device\n" in printed


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
    assert re.search(
        r"^pretrain on 4 x H100: fits, .* to spare on each; 4 minutes 10 seconds; 0\.28 device hours\n", printed
    )
    assert re.search(r"at 4,000 tokens/s, .* per device \(stated\)", printed)


def test_keys_on_the_command_line_count_as_in_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file, overlay = small_run(tmp_path, accelerator="cpu"), tmp_path / "overlay.yaml"
    overlay.write_text("data: {init_args: {micro_batch_size: 4}}\nname: other\n", encoding="utf-8")
    speed = ["--tokens_per_second", "1000"]  # an assumed one is measured each time
    expected = planned(capsys, "--config", file, "--config", str(overlay), *speed)
    assert "Parameters of other" in expected
    assert "1 CPU process, micro-batches of 4 x 64 positions, 2 in a step" in expected
    keys = ["--data.init_args.micro_batch_size=4", "--name", "other"]
    assert planned(capsys, "--config", file, *keys, *speed) == expected
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
    assert "; 8 minutes 20 seconds; " in printed
    assert f"(measured on 1 device in {tmp_path / 'pretrain'})" in " ".join(printed.split())


def test_a_measured_speed_is_that_of_the_devices_it_was_measured_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = trained_run(tmp_path, devices="auto")
    printed = " ".join(planned(capsys, "--config", file).split())
    assert "does not say on how many devices its speed was measured" in printed
    checkpointed_on(tmp_path, 10, 1)
    checkpointed_on(tmp_path, 20, 4)
    printed = planned(capsys, "--config", file, "--devices", "2")
    assert "at 1,000 tokens/s" in printed
    assert f"(measured on 4 devices in {tmp_path / 'pretrain'}, taken times devices)" in " ".join(printed.split())
    assert "; 16 minutes 40 seconds; 0.56 device hours memory " in " ".join(printed.split())
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
    printed = " ".join(planned(capsys, "--config", str(file)).split())
    assert f"no speed is known: that of {tmp_path / 'pretrain'} was measured with another {key} " in printed


@pytest.mark.parametrize("given", ["auto", -1, "-1"])
def test_devices_that_are_not_counted_are_assumed(given: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = small_run(tmp_path, devices=given, num_nodes=2, accelerator="gpu")
    printed = planned(capsys, "--config", file)
    said = " ".join(printed.split())
    assert f"1 device assumed in each of 2 machines (trainer.devices: {given}); give --devices" in said
    assert "\n2 GPUs, micro-batches" in printed
    assert "device assumed" not in planned(capsys, "--config", file, "--devices", "1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "0"], "--devices: 0 must be positive"),
        (["--devices", "3"], "--devices: 8 rows (data.init_args.global_batch_size) do not divide among 3 devices"),
        (["--devices", "3"], "; take --devices 2 or 4, or a multiple of 6 rows\n"),
        (["--devices", "8"], "; take --devices 4, or data.init_args.micro_batch_size 1, or a multiple of 16 rows\n"),
        (["--trainer.devices", "3"], "trainer.devices: 8 rows"),
        (["--data.init_args.micro_batch_size", "3"], "micro_batch_size 3; data.init_args.micro_batch_size 2, or a"),
        (["--device", "H1000"], "--device: 'H1000' is not known; choose one of GB300, GB200, B200, "),
        (["--device", "H100", "--accelerator", "cpu"], "--accelerator: cpu, but --device H100 is a GPU"),
        (["--device", "this", "--accelerator", "gpu"], "--device: this machine has no CUDA device, and --accelerator"),
        (
            [
                "--device",
                "A100",
                "--model.init_args.precision.rules",
                TORCHAO,
                "--model.init_args.precision.backend=torchao",
            ],
            "in fp8 there: fp8 needs a GPU of compute capability 8.9",
        ),
        (["--mfu", "40", "--peak_tflops", "989"], "--mfu: 40.0 is a share of the peak"),
        (["--mfu", "0.4", "--peak_tflops", "989", "--tokens_per_second", "5"], "--tokens_per_second"),
        (["--peak_tflops", "989", "--tokens_per_second", "5"], "and so does --peak_tflops; leave one"),
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


def verdict(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    """What --json says; nothing else is on stdout."""
    return json.loads(planned(capsys, *args, "--json=true"))


@pytest.mark.parametrize("arguments", WIDE.values(), ids=WIDE)
def test_every_line_fits_in_100_columns(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    lines = planned(capsys, *arguments).splitlines()
    assert [line for line in lines if len(line) > 100] == []
    assert re.match(r"\S+ on [\d,]+ .*: (fits|DOES NOT FIT), ", lines[0])


def test_a_device_is_named_in_any_case_and_compared_with_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = small_run(tmp_path)
    printed = planned(capsys, "--config", file, "--device", "gb200", "--devices", "4")
    assert printed.startswith("pretrain on 4 x GB200: fits, 18")
    rows = [line.split()[:3] for line in printed.splitlines() if line.split()[2:3] == ["yes"]]
    memory = {name: float(gib) for name, gib, _ in rows}
    assert memory == {  # what nvidia-smi lists
        "GB300": 277.5,
        "GB200": 185.0,
        "B200": 179.1,
        "H200": 140.4,
        "H100": 79.6,
        "A100": 80.0,
        "L40S": 45.0,
    }


def test_the_verdict_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = small_run(tmp_path)
    told = verdict(capsys, "--config", file, "--device", "H100", "--devices", "4", "--mfu", "0.25")
    found, memory = told["verdict"], told["memory"]["this run"]
    assert found["counted_gib"] * 2**30 == max(memory["peak"], memory["first_peak"])
    assert found["device_gib"] - found["counted_gib"] - found["allowance_gib"] == pytest.approx(found["spare_gib"])
    assert found["allowance_gib"] == pytest.approx(0.15 * found["counted_gib"] + 2)
    assert found["tflops_per_device"] == pytest.approx(0.25 * 66.9), "fp32"
    speed = 4 * 0.25 * 66.9e12 / told["flops_per_token"]["training"]
    assert found["tokens_per_second"] == pytest.approx(speed)
    assert found["seconds"] == pytest.approx(told["length"]["tokens"] / speed)
    assert found["device_hours"] == pytest.approx(found["seconds"] * 4 / 3600)
    assert found["speed_basis"] == "stated"
    assert [kind["device"] for kind in told["kinds"]] == ["GB300", "GB200", "B200", "H200", "H100", "A100", "L40S"]
    assert next(kind for kind in told["kinds"] if kind["device"] == "H100") == found


def test_formats_are_judged_for_the_device_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """NVFP4 and MXFP8 need compute capability 10.0, FP8 8.9; this machine has neither."""
    rules = '[{pattern: "*shared_experts.up_proj", format: nvfp4}, {pattern: "*shared_experts.down_proj", format: fp8}]'
    told = verdict(
        capsys,
        *("--config", small_run(tmp_path), "--device", "H200"),
        *("--model.init_args.precision.rules", rules, "--model.init_args.precision.bf16_tail=0"),
    )
    backends = {row["format"]: row["backend"] for row in told["precision"]}
    assert backends == {"fp32": "torch", "nvfp4": "emulated", "fp8": "transformer_engine"}
    emulated = {kind["device"]: kind["emulated"] for kind in told["kinds"]}
    assert emulated == {
        **{name: [] for name in ("GB300", "GB200", "B200")},
        **{name: ["nvfp4"] for name in ("H200", "H100", "L40S")},
        "A100": ["nvfp4", "fp8"],
    }


def test_what_does_not_fit_is_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The mends are tried: the number of devices that is named fits."""
    arguments = ["--config", str(PRETRAIN / "nano.yaml"), "--device", "H100"]
    told = verdict(capsys, *arguments, "--devices", "2")
    assert not told["verdict"]["fits"]
    (mend,) = [note for note in told["notes"] if note.startswith("--devices")]
    assert verdict(capsys, *arguments, "--devices", mend.split()[1])["verdict"]["fits"]


def test_this_machine_is_judged_by_its_own_memory_and_speed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("app.planning.devices.machine_memory", lambda: 2**30)
    monkeypatch.setattr("app.planning.devices.measure_peak", lambda device, number_format: Peak(1e11, ""))
    file = small_run(tmp_path, accelerator="cpu")
    one = verdict(capsys, "--config", file, "--device", "this")["verdict"]
    assert (one["device"], one["device_gib"], one["fits"]) == ("CPU process here", 1, True)
    assert one["tflops_per_device"] == pytest.approx(0.05), "half of the peak is assumed"
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    two = verdict(capsys, "--config", file, "--devices", "4")["verdict"]
    assert (two["device_gib"], two["fits"]) == (0.25, False), "a process needs half a GiB"
    assert two["tokens_per_second"] == pytest.approx(one["tokens_per_second"]), "four processes share the same cores"
