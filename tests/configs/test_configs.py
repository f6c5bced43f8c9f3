"""Every run file is what it was when somebody last looked, builds its model and its data, and takes every layout."""

from pathlib import Path

import pytest
import yaml

from app.cli import RunCLI, parse_run
from modules.backbone.config import BackboneConfig
from modules.base import StageModule
from tests.configs.prints import CONFIGS, RESOLVED, RUNS, print_of, resolve

LAYOUTS = sorted((CONFIGS / "layout").glob("*.yaml"))
MODELS = sorted((CONFIGS / "model").glob("*.yaml"))
LAYOUT_KEYS = {"accelerator", "devices", "num_nodes"}
"""Keys of the trainer that a layout may set, beside the rows that a device computes at a time."""
REGENERATE = "changed; if that is meant: .venv/bin/python -m tests.configs.prints"


def name(file: Path) -> str:
    return str(file.relative_to(CONFIGS))


def parse(*files: Path) -> RunCLI:
    return parse_run([argument for file in files for argument in ("--config", str(file))])


@pytest.mark.parametrize("file", RUNS, ids=name)
def test_the_resolved_configuration_is_the_committed_one(file: Path):
    assert resolve(file) == print_of(file).read_text(encoding="utf-8"), f"{name(file)} {REGENERATE}"


def test_every_print_has_its_run_file():
    assert sorted(RESOLVED.rglob("*.yaml")) == sorted(print_of(file) for file in RUNS)


@pytest.mark.parametrize("file", RUNS, ids=name)
def test_model_and_data_of_every_run_fit_together(file: Path):
    run = parse(file)
    module, data = run.instantiate("model"), run.instantiate("data")
    assert isinstance(module, StageModule)
    module.build_network()
    module.schedule.check_length(data.total.tokens)
    assert data.total.tokens == data.total.steps * data.global_batch_size * data.sequence_length
    assert data.global_batch_size % data.micro_batch_size == 0


def test_no_two_runs_share_a_folder():
    names = [parse(file).config.name for file in RUNS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("file", MODELS, ids=name)
def test_every_model_file_is_a_backbone(file: Path):
    BackboneConfig(**yaml.safe_load(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_a_layout_changes_devices_and_nothing_else(layout: Path):
    for file in RUNS:
        plain, laid_out = parse(file).config.as_dict(), parse(file, layout).config.as_dict()
        changed = {key for key, value in laid_out["trainer"].items() if plain["trainer"][key] != value}
        assert changed
        assert changed <= LAYOUT_KEYS
        for config in (plain, laid_out):
            del config["trainer"], config["config"], config["data"]["init_args"]["micro_batch_size"]
        assert plain == laid_out


@pytest.mark.parametrize(
    ("run", "layout"),
    [
        ("pretrain/super", "gpu8x64"),
        ("pretrain/nano", "gpu8x64"),
        ("pretrain/ultra", "gpu8x64"),
        ("pretrain/nano_9b_v2", "gpu8"),
        ("pretrain", "cpu2"),
        ("pretrain_nvfp4", "cpu2"),
    ],
)
def test_the_layout_for_a_run_file_divides_its_batch(run: str, layout: str):
    files = CONFIGS / f"{run}.yaml", CONFIGS / "layout" / f"{layout}.yaml"
    parsed = parse(*files)
    data, trainer = parsed.instantiate("data"), parsed.config.trainer
    assert data.global_batch_size % (data.micro_batch_size * trainer.devices * trainer.num_nodes) == 0


def test_super_has_the_published_run():
    run = parse(CONFIGS / "pretrain" / "super.yaml")
    module, data = run.instantiate("model"), run.instantiate("data")
    assert (data.global_batch_size, data.sequence_length) == (3072, 8192)
    assert abs(data.total.steps - 993_404) <= 10  # published iterations; ours follow from 25T tokens
    assert round(module.schedule.decay_tokens / data.after(1).tokens) == 198_682
    rate = module.optimizer_config.learning_rate
    assert rate * module.schedule.factor(200_000_000_000, data.total.tokens) == 4.5e-4
    assert rate * module.schedule.factor(data.total.tokens, data.total.tokens) == pytest.approx(4.5e-6)
    for phase, tokens in zip(data.phases, (20e12, None), strict=True):
        assert phase.until_tokens == tokens
        assert sum(phase.sources.values()) == pytest.approx(100)
    drawn = {source for phase in data.phases for source in phase.sources}
    assert drawn == set(data.sources)


@pytest.mark.parametrize(
    ("name", "average", "rows", "length", "tokens"),
    [("super_stage1", "tokens", 64, 2**18, 80e9), ("super_stage2", "conversations", 32, 2**19, None)],
)
def test_fine_tuning_of_super_is_the_published_one(name: str, average: str, rows: int, length: int, tokens) -> None:
    run = parse(CONFIGS / "sft" / f"{name}.yaml")
    module, data = run.instantiate("model"), run.instantiate("data")
    assert (module.loss_average, module.mtp_depths, module.mtp_loss_factor) == (average, 2, 0.3)
    assert (data.global_batch_size, data.sequence_length) == (rows, length)
    optimizer = module.optimizer_config
    assert (optimizer.learning_rate, optimizer.betas, optimizer.weight_decay) == (1e-5, (0.9, 0.95), 0.1)
    assert module.schedule.factor(data.total.tokens, data.total.tokens) == 1, "constant to the end"
    policies = run.config.data.init_args.policies
    assert (policies.thinking_off, policies.low_effort) == (0.03, 0.02)
    if tokens is not None:
        assert data.total.tokens == pytest.approx(tokens, rel=1e-3)
        assert module.schedule.warmup_tokens == 30_000 * length


def test_budget_control_has_the_published_length_and_share_of_cut_thoughts():
    run = parse(CONFIGS / "sft" / "super_budget.yaml")
    assert run.instantiate("data").total.steps == 350
    assert run.config.data.init_args.policies.truncated_thoughts == 0.12


def test_adapters_of_nano_are_those_of_the_public_recipe():
    run = parse(CONFIGS / "sft" / "nano_lora.yaml")
    module, data = run.instantiate("model"), run.instantiate("data")
    assert (module.lora.rank, module.lora.alpha, module.lora.dropout) == (32, 32, 0)
    assert (data.total.steps, data.global_batch_size, data.sequence_length) == (1000, 128, 2048)
    assert module.optimizer_config.learning_rate == 1e-4
