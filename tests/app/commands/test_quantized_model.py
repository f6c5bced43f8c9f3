"""Commands that run a MODEL, on a quantised one: it runs as it is served, or dequantised, and they say which."""

import json
from pathlib import Path

import pytest
import torch

from modules.checkpoints.load import load_model
from modules.checkpoints.quantization import LayerQuantization
from modules.checkpoints.source import open_model
from modules.precision.quantized import quantize_weight, tensor_scale
from tests.app.models import TEXTS
from tests.modules.checkpoints.quantized_folders import write_quantized

NVFP4, FP8 = LayerQuantization("nvfp4", True), LayerQuantization("fp8", True)
SERVED = (
    "runs as it is served: FP8 weights and inputs, emulated (modules: 4); NVFP4 weights and inputs, emulated "
    "(modules: 6); fp32 (the rest); keys and values in FP8"
)
DEQUANTISED = "runs with dequantised weights in fp32; inputs, keys and values are not quantised"


@pytest.fixture(scope="module")
def quantized(models, tmp_path_factory) -> Path:
    """The first model: Mamba-2 in FP8, latent projections and expert inputs in NVFP4, keys and values in FP8."""
    source = open_model(models["first"])
    kinds = {name: FP8 for name in source.tensors if name.endswith(("in_proj.weight", "out_proj.weight"))}
    kinds |= {name: NVFP4 for name in source.tensors if name.endswith("_latent_proj.weight")}
    kinds |= {name: NVFP4 for name in source.tensors if ".experts." in name and name.endswith("up_proj.weight")}
    target = tmp_path_factory.mktemp("models") / "quantized"
    write_quantized(
        source,
        kinds,
        {"backbone.layers.2.mixer": (0.01, 0.01)},
        lambda name: quantize_weight(
            source.read(name), kinds[name].format, input_scale=tensor_scale(torch.tensor(6.0), kinds[name].format)
        ),
        target,
        layout="modelopt",
        max_shard_bytes=10**9,
        report=lambda line: None,
    )
    return target


@torch.inference_mode()
def logprobs(network, ids: list[int]) -> list[float]:
    chosen = network.logits(network(torch.tensor([ids[:-1]])).hidden[0]).log_softmax(-1)
    return chosen.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def test_score_beside_the_model_it_was_made_of(quantized, models, program, tmp_path) -> None:
    rows = tmp_path / "in.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    kl = {}
    for dtype, note in (("auto", SERVED), ("fp32", DEQUANTISED)):
        output = tmp_path / f"{dtype}.jsonl"
        options = ("--input", rows, "--output", output, "--reference", models["first"], "--dtype", dtype)
        result = program.run("score", quantized, *options)
        assert result.code == 0, result.output
        assert f"note: {quantized}: {note}\n" in result.output
        assert result.output.count("runs ") == 1, "of the reference there is nothing to say"
        answers = [json.loads(line) for line in output.read_text().splitlines()]
        network = load_model(quantized, dtype).network
        for answer in answers:
            differences = torch.tensor(answer["logprobs"]) - torch.tensor(logprobs(network, answer["token_ids"]))
            assert differences.abs().median() < 1e-4, "a rounding of bf16 sums may move a few numbers"
        kl[dtype] = torch.tensor([value for answer in answers for value in answer["kl"]]).mean()
    assert 0 < 1.1 * kl["fp32"] < kl["auto"] < 1


def test_generate(quantized, program) -> None:
    result = program.run("generate", quantized, "--prompt", "def add", "--max_new_tokens", "8")
    assert result.code == 0, result.output
    assert f"note: {quantized}: {SERVED}\n" in result.output
    assert "decoding runs in torch alone" not in result.output
    assert "8 tokens in" in result.output
    result = program.run("generate", quantized, "--prompt", "def add", "--max_new_tokens", "8", "--dtype", "fp32")
    assert f"note: {quantized}: {DEQUANTISED}\n" in result.output
    assert "decoding runs in torch alone" not in result.output
