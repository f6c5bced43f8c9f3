"""Folders of safetensors files, written tensor by tensor, that are either complete or not there.

A safetensors file is eight bytes that say how long its header is, the header (JSON: dtype, shape and place of each
tensor), and the tensors' bytes. The package's `save_file` wants all tensors of a file in memory; as dtypes and shapes
are known before, the header can be written first, and one tensor at a time is enough.
"""

import errno
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modules.checkpoints import folder
from modules.checkpoints.names import TensorInfo
from modules.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ALIGNMENT = 8
"""Bytes the header is filled up to a multiple of, so that the first tensor lies on one."""
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
}
"""Names of dtypes in the header."""
UNITS = {"": 1} | {
    prefix + suffix: base ** (power + 1)
    for suffix, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT")
}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 5GB, 500MB, 2GiB or 1000000; case and blanks do not count.

    Raises:
        UserError: it is no size, or none above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B)?", text.strip(), re.IGNORECASE)
    units = {name.upper(): factor for name, factor in UNITS.items()} | {"B": 1}
    size = int(float(match[1]) * units[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise UserError(f"--max_shard_size: {text!r} is no size; give one like 5GB, 500MB or 2GiB")
    return size


def check_new(output: Path) -> None:
    """Check that a folder can be made.

    Raises:
        UserError: it holds files already, or is a file.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"--output: {output} is a file; name a folder that does not exist yet")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"--output: {output} holds files already; name another folder, or delete it")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give a folder to fill that becomes `output`, flushed to the disk, once the block ends; else nothing is left.

    Args:
        output: must not exist, or be an empty folder.

    Raises:
        UserError: it holds files already.
        OSError: the disk is full, or the folder cannot be written.
    """
    check_new(output)
    target = output.absolute()
    partial = folder.begin(target)
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            folder.sync(path)
        partial.rename(target)
        folder.sync(target.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(output)) from error
        raise


def plan_shards(tensors: Mapping[str, TensorInfo], max_bytes: int) -> dict[str, list[str]]:
    """Return which tensors each file holds, in the order given; a tensor over the limit gets a file of its own.

    Args:
        tensors: by name.
        max_bytes: most bytes of tensors in a file.
    """
    shards: list[list[str]] = []
    room = 0
    for name, info in tensors.items():
        size = size_of(info)
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": names for n, names in enumerate(shards, 1)}


def write_tensors(
    target: Path,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    max_bytes: int,
    report: Callable[[str], None],
) -> list[str]:
    """Write tensors into safetensors files, with an index where there are several.

    Args:
        target: folder to write into.
        tensors: shape and dtype on the disk, by name.
        read: returns a tensor by name, on the CPU, in any dtype; called once for each, in order.
        max_bytes: most bytes of tensors in a file.
        report: gets a line for each file that is written.

    Returns:
        Names of the files, the index among them.
    """
    shards = plan_shards(tensors, max_bytes)
    for number, (file, names) in enumerate(shards.items(), 1):
        written = _write_file(target / file, {name: tensors[name] for name in names}, read)
        report(f"{number}/{len(shards)}  {file}  {len(names):,} tensors, {show_size(written)}")
    if len(shards) == 1:
        return list(shards)
    index = {
        "metadata": {"total_size": sum(map(size_of, tensors.values()))},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    write_json(target / INDEX, index)
    return [*shards, INDEX]


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write an object as JSON."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def size_of(info: TensorInfo) -> int:
    """Return the bytes of a tensor."""
    return prod(info.shape) * info.dtype.itemsize


def show_size(size: float) -> str:
    """Return bytes as people read them, in powers of 1000 as shard limits are."""
    for unit in ("bytes", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.2f} GB"


def _write_file(file: Path, tensors: Mapping[str, TensorInfo], read: Callable[[str], Tensor]) -> int:
    """Write one safetensors file; return its size in bytes.

    Wider dtypes come first in the file, which keeps every tensor aligned to its dtype; they are written in the order
    given all the same, so that what comes from one source is read at one time.
    """
    places, size = _places(tensors)
    header = _header(tensors, places)
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        start = stream.tell()
        for name, info in tensors.items():
            stream.seek(start + places[name])
            stream.write(_bytes(read(name), name, info))
    return start + size


def _places(tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, int], int]:
    """Return the first byte of each tensor among the data, in the order they lie there, and the bytes of all."""
    places, end = {}, 0
    for name in sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize):
        places[name] = end
        end += size_of(tensors[name])
    return places, end


def _header(tensors: Mapping[str, TensorInfo], places: Mapping[str, int]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, start in places.items():
        info = tensors[name]
        offsets = [start, start + size_of(info)]
        entries[name] = {"dtype": CODES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % ALIGNMENT)


def _bytes(tensor: Tensor, name: str, info: TensorInfo) -> memoryview:
    assert tuple(tensor.shape) == info.shape, f"{name}: {tuple(tensor.shape)} read, {info.shape} announced"
    flat = tensor.detach().to(info.dtype).contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
