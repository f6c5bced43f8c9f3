"""Files that the safetensors package reads, in a folder that is complete or not there."""

import errno
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from modules.checkpoints.names import TensorInfo
from modules.checkpoints.writer import new_folder, parse_size, plan_shards, show_size, write_tensors
from modules.errors import UserError

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


def test_tensors_are_read_in_order_and_lie_aligned(tmp_path: Path):
    calls: list[str] = []

    def read(name: str) -> Tensor:
        calls.append(name)
        return TENSORS[name]

    write_tensors(tmp_path, infos(TENSORS), read, 10**9, lambda line: None)
    assert calls == list(TENSORS)
    content = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, tensor in TENSORS.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0


@pytest.mark.parametrize("limit", [10**9, 50, 16, 1])
def test_the_safetensors_package_reads_the_same_bits(tmp_path: Path, limit: int):
    lines: list[str] = []
    files = write_tensors(tmp_path, infos(TENSORS), TENSORS.__getitem__, limit, lines.append)
    found = read_back(tmp_path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))
    assert sorted(files) == sorted(path.name for path in tmp_path.iterdir())
    assert len(lines) == len([file for file in files if file.endswith(".safetensors")])


def test_the_index_says_where_each_tensor_is(tmp_path: Path):
    files = write_tensors(tmp_path, infos(TENSORS), TENSORS.__getitem__, 50, lambda line: None)
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
    assert write_tensors(tmp_path, infos(TENSORS), TENSORS.__getitem__, 10**9, print) == ["model.safetensors"]


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

    write_tensors(tmp_path, infos(TENSORS), read, 10**9, print)
    assert len(alive) == len(TENSORS)


def test_another_dtype_is_rounded_to(tmp_path: Path):
    wanted = {"b": TensorInfo((4,), torch.bfloat16)}
    values = torch.tensor([1.0, 1.00390625, -3.3, 1e30])
    write_tensors(tmp_path, wanted, lambda name: values, 10**9, print)
    assert torch.equal(read_back(tmp_path)["b"], values.bfloat16())


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2 * 2**30), ("1.5KB", 1500), ("12", 12), ("7B", 7)],
)
def test_sizes(text: str, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5XB", "-1GB", "0", "GB", "0.1"])
def test_what_is_no_size(text: str):
    with pytest.raises(UserError, match=r"--max_shard_size: .* is no size"):
        parse_size(text)


def test_sizes_for_people():
    assert [show_size(size) for size in (0, 999, 16_100_000, 247_222_108_160)] == [
        "0 bytes",
        "999 bytes",
        "16.1 MB",
        "247.22 GB",
    ]


def test_a_folder_appears_when_it_is_complete(tmp_path: Path):
    with new_folder(tmp_path / "deep" / "model") as partial:
        (partial / "file").write_text("content")
        assert not (tmp_path / "deep" / "model").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]
    assert (tmp_path / "deep" / "model" / "file").read_text() == "content"


def test_an_empty_folder_is_filled(tmp_path: Path):
    (tmp_path / "model").mkdir()
    with new_folder(tmp_path / "model") as partial:
        (partial / "file").touch()
    assert (tmp_path / "model" / "file").exists()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("bad"), KeyboardInterrupt()]
)
def test_a_failure_leaves_nothing_behind(tmp_path: Path, error: BaseException):
    def fail() -> None:
        with new_folder(tmp_path / "model") as partial:
            (partial / "file").touch()
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert list(tmp_path.iterdir()) == []
    if isinstance(error, OSError):
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(tmp_path / "model")


def test_what_is_there_is_not_overwritten(tmp_path: Path):
    (tmp_path / "file").touch()
    for output, message in ((tmp_path, "holds files already"), (tmp_path / "file", "is a file")):
        with pytest.raises(UserError, match=f"--output: .* {message}"), new_folder(output):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
