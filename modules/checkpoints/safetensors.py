"""Reading safetensors files by their own header, one tensor at a time.

A file is 8 bytes with the header's length n, n bytes of JSON (name -> dtype, shape, first and last byte), and the data
(https://github.com/huggingface/safetensors#format). Reading it here and not through the library keeps the peak at one
tensor, and says in a user's words what is wrong with a file.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modules.checkpoints.documents import read_json
from modules.checkpoints.names import TensorInfo
from modules.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
QUANTIZED_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8}
"""Dtypes of the codes and block scales of quantised weights."""
LARGEST_HEADER = 100_000_000
"""The format's own bound."""
AGAIN = "copy or download the file again"


class Entry(NamedTuple):
    """A tensor in a file."""

    file: Path
    """The file."""
    info: TensorInfo
    """Shape and dtype."""
    start: int
    """Position of its first byte in the file."""


def read_folder(folder: Path, quantized: bool = False) -> dict[str, Entry]:
    """Return where every tensor of a folder lies: one model.safetensors, or an index and its shards.

    Args:
        folder: the folder.
        quantized: whether it may hold quantised weights.

    Raises:
        UserError: a file is missing or damaged, or index and shards contradict each other.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise UserError(f"{folder} holds both {SINGLE} and {INDEX}: two models; remove the one that is not meant")
    if index.exists():
        return _read_shards(folder, index, quantized)
    if single.exists():
        return read_header(single, quantized)
    others = sorted(path.name for path in folder.glob("*.safetensors")) or sorted(
        path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".gguf"}
    )
    there = f"; {others[0]} is there" if others else ""
    raise UserError(f"{folder}: neither {SINGLE} nor {INDEX} is there{there}; download the safetensors weights")


def read_entry(entry: Entry) -> Tensor:
    """Read a tensor.

    Raises:
        UserError: the file ends before the tensor does.
    """
    tensor = torch.empty(entry.info.shape, dtype=entry.info.dtype)
    if tensor.numel():
        with entry.file.open("rb") as stream:
            stream.seek(entry.start)
            count = stream.readinto(tensor.view(-1).view(torch.uint8).numpy().data)
        if count != tensor.numel() * tensor.element_size():
            raise _shortened(entry.file)
    return tensor


def read_numbers(entries: Sequence[Entry]) -> list[float]:
    """Read tensors of one number each; neighbours in the list that lie in one file cost one opening.

    Raises:
        UserError: a file ends before its tensor does.
    """
    numbers = []
    for file, group in groupby(entries, key=lambda entry: entry.file):
        with file.open("rb") as stream:
            for entry in group:
                stream.seek(entry.start)
                data = bytearray(stream.read(entry.info.dtype.itemsize))
                if len(data) < entry.info.dtype.itemsize:
                    raise _shortened(file)
                numbers.append(torch.frombuffer(data, dtype=entry.info.dtype).item())
    return numbers


def _shortened(file: Path) -> UserError:
    return UserError(f"{file} has become shorter while it was read; {AGAIN}")


def read_header(file: Path, quantized: bool = False) -> dict[str, Entry]:
    """Return the tensors of a file by name, after checking that its header and its size agree.

    Args:
        file: the file.
        quantized: whether it may hold quantised weights.

    Raises:
        UserError: they do not, or the file is no safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(LARGEST_HEADER, size - 8):
            raise UserError(f"{file} is cut short or no safetensors file ({size} bytes); {AGAIN}")
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_repetition)
        if not isinstance(header, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: its header is damaged ({error}); {AGAIN}") from None
    header.pop("__metadata__", None)
    dtypes = DTYPES | QUANTIZED_DTYPES if quantized else DTYPES
    entries = {name: _entry(file, name, said, 8 + length, dtypes) for name, said in header.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.start != end and math.prod(entry.info.shape):
            raise UserError(f"{file}: its header puts tensor {name} at byte {entry.start} instead of {end}; {AGAIN}")
        end += math.prod(entry.info.shape) * entry.info.dtype.itemsize
    if end != size:
        raise UserError(f"{file} has {size} bytes where its header means {end}; {AGAIN}")
    return entries


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise UserError(f"tensor {name} is there twice")
    return found


def _entry(file: Path, name: str, said: Any, data: int, dtypes: dict[str, torch.dtype]) -> Entry:
    """Return the entry that a header gives of a tensor, checked but for its place; `data` is where the data begin."""
    try:
        kind, shape, (start, end) = said["dtype"], tuple(said["shape"]), said["data_offsets"]
        valid = all(type(number) is int and number >= 0 for number in (*shape, start, end))
    except (TypeError, KeyError, ValueError):
        kind, shape, start, end, valid = None, (), 0, 0, False
    if not valid:
        raise UserError(f"{file}: its header is damaged at tensor {name}; {AGAIN}")
    if not isinstance(kind, str) or kind not in dtypes:
        quantized = isinstance(kind, str) and kind in QUANTIZED_DTYPES
        mend = (
            "no configuration says that the model is quantised: download its JSON files too"
            if quantized
            else ("take the model in bf16")
        )
        raise UserError(f"{file}: tensor {name} has dtype {kind}, but weights must be {', '.join(DTYPES)}; {mend}")
    needed = math.prod(shape) * dtypes[kind].itemsize
    if end - start != needed:
        raise UserError(
            f"{file}: its header gives tensor {name} {end - start} bytes, but {kind} {list(shape)} needs "
            f"{needed}; {AGAIN}"
        )
    return Entry(file, TensorInfo(shape, dtypes[kind]), data + start)


def _read_shards(folder: Path, index: Path, quantized: bool) -> dict[str, Entry]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(_is_file_name(value) for value in places.values()):
        raise UserError(f"{index}: weight_map must give the file of each tensor; {AGAIN}")
    entries: dict[str, Entry] = {}
    for shard in sorted(set(places.values())):
        if not (folder / shard).is_file():
            problem = "is no file" if (folder / shard).exists() else "is missing"
            raise UserError(f"{folder / shard} {problem}, though {index.name} names it; download it")
        for name, entry in read_header(folder / shard, quantized).items():
            if name in entries:
                raise UserError(
                    f"tensor {name} is in two files, {entries[name].file} and {entry.file}; download both again"
                )
            if name not in places:
                raise UserError(f"{index}: it has no entry for tensor {name}, which {entry.file.name} holds; {AGAIN}")
            entries[name] = entry
    for name, shard in places.items():
        if name not in entries or entries[name].file.name != shard:
            raise UserError(f"{index}: it says that {shard} holds tensor {name}, which is not so; {AGAIN}")
    return entries


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and Path(value).name == value and value not in ("", "..")
