"""Which format each part computes in, and the sums of the FLOP table."""

import pytest
import torch

from app.planning.arithmetic import flop_lines, part_formats
from modules.backbone.flops import decode_flops, matmul_flops, training_flops_per_token
from modules.backbone.model import Network
from modules.precision.recipe import PrecisionConfig, PrecisionRule, assign_formats
from tests.modules.helpers import tiny_config


def table_of(*rules: tuple[str, str], **changes: object) -> list[tuple[str, str, str]]:
    with torch.device("meta"):
        network = Network(tiny_config(**changes))
    chosen = [PrecisionRule(pattern=pattern, format=chosen) for pattern, chosen in rules]
    return assign_formats(PrecisionConfig(recipe=None, rules=chosen), network)


def test_every_part_has_a_format() -> None:
    formats = part_formats(tiny_config(), table_of(("*", "bf16")))
    parts = matmul_flops(tiny_config(), 8, 1)
    assert {part: formats[part] for part in parts} == {
        part: "fp32" if part.endswith("router") else "bf16" for part in parts
    }


def test_a_recipe_is_followed_module_by_module() -> None:
    rules = [
        ("backbone.layers.1.mixer.experts.*", "fp32"),
        ("backbone.layers.2.mixer.[qk]_proj", "fp32"),
        ("mtp.*", "fp32"),
        ("*", "bf16"),
    ]
    formats = part_formats(tiny_config(), table_of(*rules))
    assert formats["MoE routed experts"] == "fp32, bf16"
    assert formats["attention projections"] == "fp32, bf16"
    assert formats["attention scores"] == "fp32"
    assert formats["Mamba-2 scan"] == formats["head"] == formats["MTP head"] == "bf16"
    assert formats["MTP eh_proj"] == formats["MTP MoE shared expert"] == formats["MTP attention scores"] == "fp32"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_table_adds_up(checkpointing: bool) -> None:
    config = tiny_config()
    lines = flop_lines(config, table_of(("*", "bf16")), 64, 2, checkpointing)
    end = next(index for index, line in enumerate(lines) if line.startswith("all "))
    numbers = [[cell for cell in line.replace(",", "").split() if cell[0].isdigit()] for line in lines[1:end]]
    total, decoded = map(float, lines[end].split()[1:])
    assert lines[0].startswith("kFLOP")
    assert total == pytest.approx(training_flops_per_token(config, 64, 2) / 1e3, abs=1e-4)
    assert decoded == pytest.approx(sum(decode_flops(config, 64).values()) / 1e3, abs=1e-4)
    assert sum(float(row[0]) for row in numbers) == pytest.approx(total, abs=2e-3)
    assert sum(float(row[2]) for row in numbers if len(row) > 2) == pytest.approx(decoded, abs=2e-3)
    assert any("recomputed" in line for line in lines) is checkpointing
