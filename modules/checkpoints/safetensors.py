"""Reading safetensors files by their own header, one tensor at a time.

A file is 8 bytes with the header's length n, n bytes of JSON (name -> dtype, shape, first and last byte), and the data
(https://github.com/huggingface/safetensors#format). Reading it here and not through the library keeps the peak at one
tensor, and says in a user's words what is wrong with a file.
"""

import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modules.checkpoints.documents import read_json
from modules.checkpoints.names import TensorInfo

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
LARGEST_HEADER = 100_000_000
AGAIN = "copy or download it again"


class Entry(NamedTuple):
    """A tensor in a file."""

    file: Path
    """The file."""
    info: TensorInfo
    """Shape and dtype."""
    start: int
    """Position of its first byte in the file."""


def read_folder(folder: Path) -> dict[str, Entry]:
    """Return where every tensor of a folder lies: one model.safetensors, or an index and its shards.

    Raises:
        ValueError: a file is missing or damaged, or index and shards contradict each other.
    """
    if (folder / INDEX).exists():
        return _read_shards(folder)
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    raise ValueError(f"{folder}: neither {SINGLE} nor {INDEX} is there; only safetensors weights are read")


def read_entry(entry: Entry) -> Tensor:
    """Read a tensor.

    Raises:
        ValueError: the file ends before the tensor does.
    """
    tensor = torch.empty(entry.info.shape, dtype=entry.info.dtype)
    size = tensor.numel() * tensor.element_size()
    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        if size and stream.readinto(tensor.view(-1).view(torch.uint8).numpy()) != size:
            raise ValueError(f"{entry.file} is cut short; {AGAIN}")
    return tensor


def read_header(file: Path) -> dict[str, Entry]:
    """Return the tensors of a file by name, after checking that header and file size agree.

    Raises:
        ValueError: they do not, or the file is no safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(LARGEST_HEADER, size - 8):
            raise ValueError(f"{file} is cut short or no safetensors file ({size} bytes); {AGAIN}")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{file}: its header is damaged ({error}); {AGAIN}") from None
    header.pop("__metadata__", None)
    entries, end = {}, 0
    for name, said in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        entries[name], end = _entry(file, name, said, 8 + length, end)
    if 8 + length + end != size:
        raise ValueError(f"{file} has {size} bytes, but its header means {8 + length + end}; {AGAIN}")
    return entries


def _entry(file: Path, name: str, said: dict[str, Any], data: int, previous: int) -> tuple[Entry, int]:
    """Return a tensor's entry and where it ends, after checking it; `previous` is where the one before ends."""
    if said["dtype"] not in DTYPES:
        raise ValueError(f"{file}: tensor {name} has dtype {said['dtype']}; only {', '.join(DTYPES)} can be read")
    info = TensorInfo(tuple(said["shape"]), DTYPES[said["dtype"]])
    start, end = said["data_offsets"]
    if start != previous or end - start != math.prod(info.shape) * info.dtype.itemsize:
        raise ValueError(f"{file}: the header lies about tensor {name}; {AGAIN}")
    return Entry(file, info, data + start), end


def _read_shards(folder: Path) -> dict[str, Entry]:
    index = read_json(folder / INDEX)
    where = index["weight_map"]
    entries: dict[str, Entry] = {}
    for shard in sorted(set(where.values())):
        if not (folder / shard).exists():
            raise ValueError(f"{folder / INDEX} names {shard}, which is not there; download it")
        entries |= read_header(folder / shard)
    return entries
