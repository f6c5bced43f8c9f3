"""Files that the safetensors package reads, and that are read through it."""

import json
import re
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from modules.checkpoints.names import TensorInfo
from modules.checkpoints.safetensors import plan_shards, read_folder, show_size, write_tensors

TENSORS = {
    "a": torch.randn(3, generator=torch.Generator().manual_seed(0)).bfloat16(),  # 6 bytes: what follows is not aligned
    "b": torch.arange(4.0),
    "c": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)).half(),
    "d": torch.tensor(2.5),
    "e": torch.zeros(0, 3),
    "f": torch.full((5,), -0.0).bfloat16(),
    "g": torch.arange(7).to(torch.uint8),
    "h": torch.linspace(-2, 2, 5).to(torch.float8_e4m3fn),
}


def infos(tensors: dict[str, Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def read_back(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            assert content.metadata() == {"format": "pt"}
            found |= {name: content.get_tensor(name) for name in content.keys()}
    return found


def test_tensors_lie_aligned(tmp_path: Path):
    write_tensors(tmp_path, infos(TENSORS), iter(TENSORS.values()), 10**9, lambda line: None)
    content = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, tensor in TENSORS.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0


@pytest.mark.parametrize("limit", [10**9, 50, 16, 1])
def test_the_safetensors_package_reads_the_same_bits(tmp_path: Path, limit: int):
    lines: list[str] = []
    files = write_tensors(tmp_path, infos(TENSORS), iter(TENSORS.values()), limit, lines.append)
    found = read_back(tmp_path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))
    assert sorted(files) == sorted(path.name for path in tmp_path.iterdir())
    assert len(lines) == len([file for file in files if file.endswith(".safetensors")])


def test_the_index_says_where_each_tensor_is(tmp_path: Path):
    files = write_tensors(tmp_path, infos(TENSORS), iter(TENSORS.values()), 50, lambda line: None)
    assert files == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / files[-1]).read_text())
    assert index["metadata"] == {
        "total_size": sum(tensor.numel() * tensor.element_size() for tensor in TENSORS.values())
    }
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "pt") as content:
            assert name in content.keys()
    assert index["weight_map"].keys() == TENSORS.keys()


def test_one_file_needs_no_index(tmp_path: Path):
    assert write_tensors(tmp_path, infos(TENSORS), iter(TENSORS.values()), 10**9, print) == ["model.safetensors"]


def test_shards_keep_to_the_limit_and_to_the_order():
    tensors = {str(size): TensorInfo((size,), torch.float32) for size in (5, 3, 2, 40, 1, 9)}
    assert list(plan_shards(tensors, 40).values()) == [["5", "3", "2"], ["40"], ["1", "9"]]
    assert list(plan_shards(tensors, 39).values()) == [["5", "3"], ["2"], ["40"], ["1"], ["9"]]


def test_a_tensor_is_gone_when_the_next_is_read(tmp_path: Path):
    alive: list[weakref.ref] = []

    def read(name: str) -> Tensor:
        assert all(reference() is None for reference in alive)
        tensor = TENSORS[name].clone()
        alive.append(weakref.ref(tensor))
        return tensor

    write_tensors(tmp_path, infos(TENSORS), map(read, TENSORS), 10**9, print)
    assert len(alive) == len(TENSORS)


def test_another_dtype_is_rounded_to(tmp_path: Path):
    wanted = {"b": TensorInfo((4,), torch.bfloat16)}
    values = torch.tensor([1.0, 1.00390625, -3.3, 1e30])
    write_tensors(tmp_path, wanted, iter([values]), 10**9, print)
    assert torch.equal(read_back(tmp_path)["b"], values.bfloat16())


def test_sizes_for_people():
    assert [show_size(size) for size in (0, 999, 16_100_000, 247_222_108_160)] == [
        "0 bytes",
        "999 bytes",
        "16.1 MB",
        "247.22 GB",
    ]


@pytest.mark.parametrize("limit", [10**9, 50])
def test_rows_and_tensors_are_read_back_in_any_order(tmp_path: Path, limit: int):
    write_tensors(tmp_path, infos(TENSORS), iter(TENSORS.values()), limit, print)
    entries = read_folder(tmp_path, quantized=True)
    assert {name: entry.info for name, entry in entries.items()} == infos(TENSORS)
    for name, tensor in [*TENSORS.items()][::-1]:
        assert torch.equal(entries[name].read().flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))
        if tensor.ndim:
            for rows in (slice(0), slice(1, 3), slice(None)):
                read = entries[name].read(rows)
                assert read.shape == tensor[rows].shape
                assert torch.equal(read.flatten().view(torch.uint8), tensor[rows].flatten().view(torch.uint8))


@pytest.mark.skipif(sys.platform != "linux", reason="what is in memory is read from /proc")
def test_what_was_read_of_a_file_does_not_stay_in_memory(tmp_path: Path):
    """64 MiB in tensors of 1 MiB, each dropped when the next is read."""
    tensors = {str(number): torch.full((2**18,), float(number)) for number in range(64)}
    write_tensors(tmp_path, infos(tensors), iter(tensors.values()), 10**9, print)

    def mapped() -> int:
        return int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024

    entries, before, most = read_folder(tmp_path), mapped(), 0
    for name in tensors:
        assert entries[name].read().sum() == int(name) * 2**18
        most = max(most, mapped())
    assert most - before < 24
