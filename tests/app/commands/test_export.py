"""`export` as a user starts it."""

import resource
from pathlib import Path

import pytest
import torch

from app.__main__ import main
from modules.checkpoints.source import open_model
from tests.app.commands.helpers import refusal, run_tensors, write_run
from tests.modules.checkpoints.folders import stored_tensors, write_hf_folder
from tests.modules.checkpoints.quantized_folders import (
    W4A4,
    W8A8,
    all_bytes,
    make_source,
    mixed,
    write_quantized_folder,
)
from tests.modules.helpers import make_network, tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "small")


def test_a_run_is_exported_by_its_newest_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", str(run), "--output", str(tmp_path / "hf"), "--max_shard_size", "100KB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{run / 'checkpoints' / 'step=00000040'}: {len(run_tensors(2))} tensors"
    shards = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert [line.split()[1] for line in lines[1:-1]] == shards
    assert lines[-1].startswith(f"{tmp_path / 'hf'}: {len(run_tensors(2))} tensors, {len(shards) + 7} files, ")
    found = stored_tensors(tmp_path / "hf")
    assert all(torch.equal(found[name], tensor) for name, tensor in run_tensors(2).items())


def test_dtypes_may_have_the_names_of_torch(run: Path, tmp_path: Path):
    assert main(["export", str(run), "--output", str(tmp_path / "hf"), "--dtype", "bfloat16"]) == 0
    assert torch.bfloat16 in {tensor.dtype for tensor in stored_tensors(tmp_path / "hf").values()}


def test_mistakes_of_export_cost_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "hf"
    assert "holds files already" in refusal(capsys, "export", run, "--output", run)
    assert "does not exist" in refusal(capsys, "export", tmp_path / "none", "--output", output)
    assert "is no size" in refusal(capsys, "export", run, "--output", output, "--max_shard_size", "5 elephants")
    assert "--dtype" in refusal(capsys, "export", run, "--output", output, "--dtype", "fp16")
    assert not output.exists()


def test_a_damaged_tensor_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    network = make_network(tiny_config())
    with torch.no_grad():
        network.lm_head.weight[3, 3] = float("nan")
    source = write_hf_folder(tmp_path / "in" / "model", network)
    (tmp_path / "out").mkdir()
    error = refusal(capsys, "export", source, "--output", tmp_path / "out" / "hf", "--max_shard_size", "50KB")
    assert "lm_head.weight" in error
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_leaves_nothing_behind(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A limit on the size of files stands in for the disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        error = refusal(capsys, "export", run, "--output", tmp_path / "hf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.startswith(f"error: {tmp_path / 'hf'}: File too large; make room")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of quantised models by the first part of the formats' names."""
    root = tmp_path_factory.mktemp("quantized")
    source = make_source(root / "plain", tokenizer=True, vocab_size=288)
    write_quantized_folder(root / "nvfp4", source, lambda name: None if "head" in name else W4A4)
    write_quantized_folder(root / "fp8", source, lambda name: None if "head" in name else W8A8, kv=False)
    write_quantized_folder(root / "mixed", source, mixed)
    return root


@pytest.mark.parametrize("kind", ["nvfp4", "fp8", "mixed"])
def test_a_quantised_model_changes_its_layout_and_back(quantized: Path, tmp_path: Path, kind: str, capsys):
    there, back = tmp_path / "there", tmp_path / "back"
    assert (
        main(["export", str(quantized / kind), "--output", str(there), "--format", f"{kind}-compressed-tensors"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" tensors")
    assert any("leaves out the global scales of routed experts" in line for line in lines) == (kind != "fp8")
    needs = "with the package compressed-tensors beside it: pip install 'compressed-tensors>=0.15'"
    assert any(needs in line for line in lines)
    assert needs in (there / "README.md").read_text(encoding="utf-8")
    assert main(["export", str(there), "--output", str(back), "--format", f"{kind}-modelopt"]) == 0
    assert all_bytes(back) == all_bytes(quantized / kind)
    assert (back / "tokenizer.json").read_bytes() == (quantized / "plain" / "tokenizer.json").read_bytes()


def test_plain_weights_of_a_quantised_model(quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", str(quantized / "mixed"), "--output", str(tmp_path / "hf")]) == 0
    assert "as the numbers they mean, in fp32, which holds them exactly" in capsys.readouterr().out
    source = open_model(quantized / "mixed")
    for name, tensor in stored_tensors(tmp_path / "hf").items():
        assert torch.equal(tensor, source.read(name)), name
    assert main(["export", str(quantized / "mixed"), "--output", str(tmp_path / "bf16"), "--dtype", "bf16"]) == 0
    assert "rounded to bf16" in capsys.readouterr().out


def test_formats_that_do_not_fit_cost_one_line(quantized: Path, run: Path, tmp_path: Path, capsys):
    def said(model: Path, format: str) -> str:
        return refusal(capsys, "export", model, "--output", tmp_path / "out", "--format", format)

    assert f"is not quantised; first do that: python -m app quantize {run}" in said(run, "nvfp4-modelopt")
    assert "take --format mixed-modelopt" in said(quantized / "mixed", "nvfp4-modelopt")
    assert "take --format nvfp4-modelopt" in said(quantized / "nvfp4", "fp8-modelopt")
    assert "take --format fp8-compressed-tensors" in said(quantized / "fp8", "mixed-compressed-tensors")
    assert "nvfp4-compressed-tensors" in said(quantized / "fp8", "awq")
    assert not (tmp_path / "out").exists()


def test_a_quantised_model_may_be_merged(quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    models = [str(quantized / "nvfp4"), str(quantized / "plain")]
    assert main(["merge", *models, "--output", str(tmp_path / "merged")]) == 0
    assert "averaged as the numbers they mean, and the result is plain" in capsys.readouterr().out
    assert open_model(tmp_path / "merged").quantization is None
