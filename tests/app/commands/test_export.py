"""`export` as a user starts it."""

import resource
from pathlib import Path

import pytest
import torch

from app.__main__ import main
from tests.app.commands.helpers import refusal, run_tensors, write_run
from tests.modules.checkpoints.folders import stored_tensors, write_hf_folder
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
