"""`quantize` as a user starts it: what it writes, says and refuses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from app.__main__ import main
from modules.checkpoints.load import load_model
from modules.checkpoints.source import open_model
from tests.app.commands.helpers import refusal
from tests.modules.checkpoints.folders import stored_tensors, write_fit_folder, write_hf_folder
from tests.modules.helpers import make_network, tiny_config

CONFIG = tiny_config(vocab_size=288, moe_intermediate_size=32, moe_shared_expert_intermediate_size=48)
ATTENTION = "backbone.layers.2.mixer"
TEXTS = [f"def f{number}(a, b):\n    return a + {number} * b\n" for number in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantize")


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return write_hf_folder(folder / "model", make_network(CONFIG), tokenizer=True)


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return write_fit_folder(folder / "step=20", make_network(CONFIG), tokenizer=True)


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name


def quantized(model: Path, output: Path, *options: object) -> tuple[Path, dict]:
    assert main(["quantize", str(model), "--output", str(output), *map(str, options)]) == 0
    return output, json.loads((output / "quantization_report.json").read_text())


@pytest.fixture(scope="module")
def nvfp4(model: Path, data: Path, folder: Path) -> tuple[Path, dict]:
    return quantized(model, folder / "nvfp4", "--data", data)


def test_linear_layers_are_quantised_with_their_inputs_and_the_rest_is_in_bf16(nvfp4, model: Path):
    source = open_model(nvfp4[0])
    assert source.quantization is not None
    expected = {
        name
        for name in open_model(model).tensors
        if name.startswith("backbone.layers.") and name.endswith("_proj.weight")
    }
    assert source.quantization.weights.keys() == expected
    assert {layer.label for layer in source.quantization.weights.values()} == {"NVFP4 W4A4"}
    assert source.quantization.kv_scales.keys() == {ATTENTION, "mtp.layers.0.mixer"}
    plain = {name: info.dtype for name, info in source.tensors.items() if name not in expected}
    router_bias = {name for name in plain if name.endswith("e_score_correction_bias")}
    assert {name for name, dtype in plain.items() if dtype != torch.bfloat16} == router_bias


def test_fused_layers_share_scales_on_the_disk(nvfp4):
    tensors = stored_tensors(nvfp4[0])
    for suffix in ("weight_scale_2", "input_scale"):
        assert len({float(tensors[f"{ATTENTION}.{letter}_proj.{suffix}"]) for letter in "qkv"}) == 1
    for kind in ("up_proj", "down_proj"):
        experts = [f"backbone.layers.1.mixer.experts.{expert}.{kind}" for expert in range(8)]
        assert len({float(tensors[f"{expert}.input_scale"]) for expert in experts}) == 1
        assert len({float(tensors[f"{expert}.weight_scale_2"]) for expert in experts}) == 8


@torch.no_grad()
def test_figures_are_those_of_the_written_folder_by_full_logits(nvfp4, model: Path, data: Path):
    """The rows held out are the 10th, 20th, 30th and 40th."""
    folder, report = nvfp4
    before, after = (load_model(path).network for path in (model, folder))
    tokenizer = __import__("tokenizers").Tokenizer.from_file(str(model / "tokenizer.json"))
    kl, nats, agreeing, count, size = 0.0, [0.0, 0.0], 0, 0, 0
    for text in TEXTS[9::10]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        p, q = (
            network.logits(network(torch.tensor([ids[:-1]])).hidden)[0].double().log_softmax(-1)
            for network in (before, after)
        )
        kl += float((p.exp() * (p - q)).sum())
        agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
        for place, logprobs in enumerate((p, q)):
            nats[place] -= float(logprobs[torch.arange(len(ids) - 1), ids[1:]].sum())
        count += len(ids) - 1
        size += len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
    quality = report["quality"]
    assert quality["tokens"] == count
    assert quality["kl"] == pytest.approx(kl / count, rel=0.02)
    assert quality["top1_agreement"] == pytest.approx(agreeing / count, abs=1.5 / count)
    for key, value in zip(("before", "after"), nats, strict=True):
        assert quality[key]["perplexity"] == pytest.approx(torch.tensor(value / count).exp().item(), rel=1e-3)
        assert quality[key]["bits_per_byte"] == pytest.approx(value / torch.tensor(2.0).log().item() / size, rel=1e-3)


def test_bits_and_sizes_are_those_of_the_files(nvfp4, model: Path):
    folder, report = nvfp4
    files = load_file(folder / "model.safetensors")
    held = sum(tensor.nbytes for tensor in files.values())
    assert report["size"]["arithmetic"] == held
    assert report["size"]["files"] == (folder / "model.safetensors").stat().st_size
    assert report["size"]["before"] == sum(tensor.nbytes for tensor in stored_tensors(model).values())
    assert report["bits"]["quantized"] == report["bits"]["linear"] == 4.5
    weights = sum(tensor.numel() for tensor in stored_tensors(model).values())
    assert sum(row["weights"] for row in report["layers"]) == weights
    scalars = sum(tensor.nbytes for name, tensor in files.items() if tensor.ndim == 0 or tensor.shape == (1,))
    assert report["bits"]["all"] == pytest.approx(8 * (held - scalars) / weights)


def test_terminal_and_card_tell_the_same_bits_and_promise_no_engine(model, data, folder, capsys):
    for number, options in enumerate(([], ["--format", "fp8"], ["--rules", "*o_proj=bf16"])):
        output, report = quantized(model, folder / f"card{number}", "--data", data, *options)
        printed, card = capsys.readouterr().out, (output / "README.md").read_text(encoding="utf-8")
        of_quantized, of_all = f"{report['bits']['quantized']:.3f}", f"{report['bits']['all']:.3f}"
        assert f"bits per weight: {of_quantized} of the quantised layers, " in printed
        assert f"{of_all} of all" in printed
        assert f"| bits per weight of the quantised layers | {of_quantized}, with block scales |" in card
        assert f"| bits per weight of the model | {of_all} |" in card
        assert "No engine has run this folder yet" in card
        assert "vllm serve" not in card


def test_experts_are_reported_with_their_tokens(nvfp4, data: Path):
    report = nvfp4[1]
    layers = [row["layer"] for row in report["experts"]]
    assert layers == ["backbone.layers.1.mixer.experts.*", "backbone.layers.5.mixer.experts.*"]
    assert all(sum(row["tokens"]) == 2 * report["settings"]["calibration_tokens"] for row in report["experts"])


def test_a_checkpoint_of_fit_is_quantised_to_the_same(nvfp4, run: Path, data: Path, folder: Path):
    """Its weights are the Hugging Face folder's, stacked."""
    found, expected = stored_tensors(quantized(run, folder / "of_fit", "--data", data)[0]), stored_tensors(nvfp4[0])
    assert_same_bits(found, expected)


def test_other_layouts_hold_the_same_bits(nvfp4, folder: Path):
    other, back = folder / "ct", folder / "back"
    assert main(["export", str(nvfp4[0]), "--output", str(other), "--format", "nvfp4-compressed-tensors"]) == 0
    assert main(["export", str(other), "--output", str(back), "--format", "nvfp4-modelopt"]) == 0
    found, expected = stored_tensors(back), stored_tensors(nvfp4[0])
    assert_same_bits(found, expected)


def test_rules_make_a_mixed_model(model: Path, data: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
    rules = ("--rules", "*.mixer.experts.*=nvfp4", "--rules", "*.out_proj=fp8", "--rules", "mtp.*.eh_proj=fp8")
    options = ("--exclude", "*.[qkvo]_proj", "--format", "nvfp4-weight-only", "--kv_cache", "none", *rules)
    output, report = quantized(model, folder / "mixed", "--data", data, *options)
    quantization = open_model(output).quantization
    assert quantization is not None
    found = {name.removesuffix(".weight"): layer.label for name, layer in quantization.weights.items()}
    assert found["backbone.layers.1.mixer.experts.3.up_proj"] == "NVFP4 W4A4"
    assert found["backbone.layers.0.mixer.out_proj"] == found["mtp.layers.0.eh_proj"] == "FP8"
    assert found["backbone.layers.0.mixer.in_proj"] == "NVFP4 W4A16"
    assert f"{ATTENTION}.q_proj" not in found
    assert "mtp.layers.1.mixer.fc1_latent_proj" not in found
    assert quantization.kv_scales == {}
    assert report["groups"][f"{ATTENTION}.o_proj"] == {"format": "bf16", "decided_by": "*.[qkvo]_proj"}
    assert len([line for line in capsys.readouterr().out.splitlines() if "NVFP4 W4A16" in line]) == 7


def test_auto_keeps_to_its_budget_and_prints_the_choice(
    model: Path, data: Path, folder: Path, capsys: pytest.CaptureFixture[str]
):
    output, report = quantized(model, folder / "auto", "--data", data, "--format", "auto", "--effective_bits", 6)
    assert 5.5 < report["bits"]["linear"] <= 6
    printed = capsys.readouterr().out
    assert "KL nvfp4 (4.5 bits)" in printed
    for name, losses in report["search"].items():
        line = next(line for line in printed.splitlines() if line.startswith(name))
        choice = report["groups"][name]["format"]
        assert f"{losses['nvfp4']:.2e}" in line
        assert choice in line
    formats = {group["format"] for name, group in report["groups"].items() if name in report["search"]}
    assert len(formats) > 1
    assert open_model(output).quantization is not None


def test_weight_only_does_without_data(model: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
    output, report = quantized(model, folder / "weights", "--format", "nvfp4-weight-only", "--weights", "mse")
    assert report["quality"] is None
    assert "quality: not measured" in capsys.readouterr().out
    quantization = open_model(output).quantization
    assert quantization is not None
    assert not any(layer.inputs for layer in quantization.weights.values())


def test_layers_without_whole_blocks_are_kept_and_named(data: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
    network = make_network(tiny_config(vocab_size=288))  # experts' inner width 24, the shared expert's 40
    model = write_hf_folder(folder / "narrow", network, tokenizer=True)
    output, _ = quantized(model, folder / "narrow4", "--data", data)
    printed = capsys.readouterr().out
    assert "note: kept, for their in-features are no multiple of 16: backbone.layers.1.mixer.experts.*, " in printed
    quantization = open_model(output).quantization
    assert quantization is not None
    assert "backbone.layers.1.mixer.experts.0.up_proj.weight" not in quantization.weights
    assert "backbone.layers.1.mixer.fc1_latent_proj.weight" in quantization.weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "nvfp4"], "--data: "),
        (["--format", "int4"], "--format"),
        (["--data", "DATA", "--effective_bits", "5"], "only --format auto keeps to a budget"),
        (["--data", "DATA", "--format", "auto", "--effective_bits", "4"], "the least possible here is 4.5 bits"),
        (["--data", "DATA", "--exclude", "*.nothing"], "--exclude: pattern '*.nothing' matches no module"),
        (["--data", "DATA", "--rules", "*.nothing=fp8"], "--rules: pattern '*.nothing' matches no module"),
        (["--data", "DATA", "--rules", "nothing"], "must be PATTERN=FORMAT"),
        (["--data", "DATA", "--rules", "*.q_proj=fp8"], "engines run them as one"),
        (["--data", "DATA", "--exclude", "*"], "nothing would be quantised"),
        (["--data", "DATA", "--calibration_tokens", "1"], "--calibration_tokens: 1 must be at least 2"),
        (["--data", "DATA", "--max_shard_size", "many"], "is no size"),
        (["--data", "no/such/file.txt"], "no/such/file.txt is neither"),
        (["--data", "DATA", "--output", "MODEL"], "holds files already"),
    ],
)
def test_mistakes_cost_one_line_and_leave_nothing(model, data, tmp_path, capsys, options, message: str):
    output = tmp_path / "out"
    given = [{"DATA": data, "MODEL": model}.get(option, option) for option in options]
    error = refusal(capsys, "quantize", model, "--output", output, *given)
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_a_quantised_model_is_refused(nvfp4, data, tmp_path, capsys):
    error = refusal(capsys, "quantize", nvfp4[0], "--output", tmp_path / "out", "--data", data)
    assert "is quantised already; give the model that it was made of" in error
