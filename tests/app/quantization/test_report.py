"""Lines of the report, and sizes by the formats' arithmetic."""

import torch

from app.quantization.report import choice_lines, expected_size, layer_table, report_lines
from modules.checkpoints.names import TensorInfo
from modules.ptq.layers import Group, LinearGroup

LINEAR = Group("backbone.layers.0.mixer.in_proj", (LinearGroup("in", ("in.weight",), (10, 32)),))
EXPERTS = Group("backbone.layers.1.mixer.experts.*", (LinearGroup("up", ("up.0.weight", "up.1.weight"), (16, 48)),))
STORED = {
    "in.weight": TensorInfo((10, 32), torch.bfloat16),
    "up.0.weight": TensorInfo((16, 48), torch.bfloat16),
    "up.1.weight": TensorInfo((16, 48), torch.bfloat16),
    "norm.weight": TensorInfo((7,), torch.float32),
}
CHOICES = {LINEAR.name: "fp8", EXPERTS.name: "nvfp4"}
SCALES = 2 * 4
"""Bytes of the scales of a layer's weight and inputs."""


def report(**changes):
    table = layer_table([LINEAR, EXPERTS], CHOICES, STORED)
    likelihood = {"nll": 1.0, "perplexity": 2.5, "bits_per_byte": None}
    quality = {"rows": 3, "tokens": 40, "kl": 0.012, "top1_agreement": 0.975, "before": likelihood}
    quality["after"] = likelihood | {"perplexity": 2.6}
    return {
        "settings": {"texts": "corpus: training rows, and held-out rows", "bits": 5.5},
        "layers": table,
        "bits": {"quantized": 5.0, "linear": 5.25, "all": 5.5},
        "size": {"before": 4000, "files": 2020, "arithmetic": 2000},
        "experts": [{"layer": EXPERTS.name, "tokens": [400, 50], "unreached": [], "few": []}],
        "quality": quality,
        "seconds": {"calibration": 1.5, "writing": 0.1},
    } | changes


def test_the_table_counts_layers_weights_and_bits():
    rows = layer_table([LINEAR, EXPERTS], CHOICES, STORED)
    assert [(row["kind"], row["format"], row["layers"], row["weights"], row["bits"]) for row in rows] == [
        ("backbone.layers.*.mixer.in_proj", "FP8", 1, 320, 8),
        ("backbone.layers.*.mixer.experts.*", "NVFP4 W4A4", 2, 2 * 16 * 48, 4.5),
        ("embeddings, head, routers, norms, ...", "float32", 1, 7, 32),
    ]


def test_the_arithmetic_counts_codes_block_scales_and_scales():
    nvfp4 = 2 * (16 * 48 // 2 + 16 * 48 // 16 + SCALES)
    assert expected_size([LINEAR, EXPERTS], CHOICES, STORED, caches=3) == 320 + SCALES + nvfp4 + 7 * 4 + 3 * 8
    weight_only = CHOICES | {EXPERTS.name: "nvfp4-weight-only", LINEAR.name: "bf16"}
    assert expected_size([LINEAR, EXPERTS], weight_only, STORED, caches=0) == 640 + nvfp4 - SCALES + 7 * 4


def test_the_report_says_bits_sizes_and_quality():
    text = "\n".join(report_lines(report()))
    for part in (
        "bits per weight: 5.000 of the quantised layers, 5.250 of the linear layers (budget 5.5), 5.500 of all",
        "size: 4 KB before, 2.02 KB after; by the formats' arithmetic 2 KB (+1.00%",
        "held-out texts: 3 rows, 40 tokens scored (corpus: training rows, and held-out rows)",
        "perplexity  2.5000  2.6000  +4.00%",
        "KL(original || quantised): 0.012000 nats per token; the same most likely token: 97.50%",
        "experts: calibration reached all 2, each with 50 tokens or more",
        "seconds: calibration 1.5, writing 0.1",
    ):
        assert part in text, text
    assert "bits per byte" not in text


def test_experts_that_calibration_did_not_reach_are_listed_by_layer():
    coverage = [
        {"layer": EXPERTS.name, "tokens": [0, 50, 3], "unreached": [0], "few": [2]},
        {"layer": "backbone.layers.4.mixer.experts.*", "tokens": [90] * 3, "unreached": [], "few": []},
    ]
    lines = report_lines(report(experts=coverage, quality=None))
    place = next(number for number, line in enumerate(lines) if line.startswith("experts"))
    assert lines[place + 1 : place + 3] == [
        f"  {EXPERTS.name}: no token: 0",
        f"  {EXPERTS.name}: fewer than 32 tokens: 2",
    ]
    assert not any("layers.4" in line for line in lines)
    assert "quality: not measured, for there are no texts (--data)" in lines


def test_of_many_experts_the_first_are_listed_with_their_number():
    coverage = [{"layer": EXPERTS.name, "tokens": [0] * 500 + [50], "unreached": [*range(500)], "few": []}]
    line = next(line for line in report_lines(report(experts=coverage, quality=None)) if "no token" in line)
    assert line == f"  {EXPERTS.name}: no token: {', '.join(map(str, range(16)))}, ... (500 in all)"


def test_the_choice_shows_each_candidate():
    losses = {EXPERTS.name: {"nvfp4": 0.0123, "fp8": 1e-7}}
    header, line = choice_lines([LINEAR, EXPERTS], losses, CHOICES)
    assert header.split() == "group weights KL nvfp4 (4.5 bits) KL fp8 (8 bits) chosen bits".split()
    assert line.split() == [EXPERTS.name, "1,536", "1.23e-02", "1.00e-07", "nvfp4", "4.5"]
