"""Folders of safetensors files, read and written tensor by tensor.

The library maps a file into memory, where what was read of it stays until the file is closed; so one file is open at a
time, and is opened anew now and then, which takes a microsecond or two for each tensor that it holds.
The library's `save_file` wants all tensors of a file in memory; as dtypes and shapes are known before, the header can
be written first (eight bytes that say how long it is, then JSON: dtype, shape and place of each tensor), and one tensor
at a time is enough.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modules.checkpoints.folder import read_json, write_json
from modules.checkpoints.names import TensorInfo
from modules.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
QUANTIZED_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8}
"""Dtypes of the codes and block scales of quantised weights."""
CODES = {dtype: code for code, dtype in (DTYPES | QUANTIZED_DTYPES).items()}
AGAIN = "copy or download the file again"
MAPPED = 2**20, 1 / 64
"""Bytes, or share of a file if that is more, that are read before the file is opened anew."""
ALIGNMENT = 8
"""Bytes the header is filled up to a multiple of, so that the first tensor lies on one."""


class _OpenFile:
    """The one file of a folder that is open."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._content: safe_open | None = None
        self._left = 0.0

    def read(self, file: Path, name: str, rows: slice | None) -> Tensor:
        if file != self._file or self._left <= 0:
            self._content = None  # closed before the next is opened
            self._file, self._content = file, _open(file)
            self._left = max(MAPPED[0], MAPPED[1] * file.stat().st_size)
        assert self._content is not None
        tensor = self._content.get_tensor(name) if rows is None else self._content.get_slice(name)[rows]
        self._left -= tensor.nbytes
        return tensor.clone() if tensor.numel() == 1 else tensor  # who keeps a scale does not keep the file open


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    file: Path
    name: str
    info: TensorInfo
    opened: _OpenFile
    """What reads the files of its folder."""

    def read(self, rows: slice | None = None) -> Tensor:
        """Return the tensor, or some rows of it; the memory is the file's and not to be written to.

        Raises:
            UserError: the file has been damaged since it was opened first.
        """
        return self.opened.read(self.file, self.name, rows)


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
        return _read_header(single, quantized, _OpenFile())
    others = sorted(path.name for path in folder.glob("*.safetensors")) or sorted(
        path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".gguf"}
    )
    there = f"; {others[0]} is there" if others else ""
    raise UserError(f"{folder}: neither {SINGLE} nor {INDEX} is there{there}; download the safetensors weights")


def check_finite(tensor: Tensor, name: str, file: Path) -> None:
    """Raise a UserError that names tensor and file if any value is NaN or infinite."""
    if tensor.numel() == 0:
        return
    lowest, highest = tensor.aminmax()  # both are NaN if any value is; no copy of the tensor is made
    if not (lowest.isfinite() and highest.isfinite()):
        bad = int((~tensor.isfinite()).sum())
        raise UserError(
            f"{file}: tensor {name} holds {bad} values of {tensor.numel()} that are NaN or infinite; the model was "
            "saved broken: take another checkpoint of it"
        )


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise UserError(f"{file} is cut short or no safetensors file ({error}); {AGAIN}") from None


def _read_header(file: Path, quantized: bool, opened: _OpenFile) -> dict[str, Entry]:
    """Return the tensors of a file by name; the library checks that header and size agree."""
    content, dtypes = _open(file), DTYPES | QUANTIZED_DTYPES if quantized else DTYPES
    entries = {}
    for name in content.keys():
        part = content.get_slice(name)
        kind = part.get_dtype()
        if kind not in dtypes:
            mend = "take the model in bf16"
            if kind in QUANTIZED_DTYPES:
                mend = "no configuration says that the model is quantised: download its JSON files too"
            raise UserError(f"{file}: tensor {name} has dtype {kind}, but weights must be {', '.join(DTYPES)}; {mend}")
        entries[name] = Entry(file, name, TensorInfo(tuple(part.get_shape()), dtypes[kind]), opened)
    return entries


def _read_shards(folder: Path, index: Path, quantized: bool) -> dict[str, Entry]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(_is_file_name(value) for value in places.values()):
        raise UserError(f"{index}: weight_map must give the file of each tensor; {AGAIN}")
    entries: dict[str, Entry] = {}
    opened = _OpenFile()
    for shard in sorted(set(places.values())):
        if not (folder / shard).is_file():
            problem = "is no file" if (folder / shard).exists() else "is missing"
            raise UserError(f"{folder / shard} {problem}, though {index.name} names it; download it")
        for name, entry in _read_header(folder / shard, quantized, opened).items():
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
        return {SINGLE: shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": names for n, names in enumerate(shards, 1)}


def write_tensors(
    target: Path,
    tensors: Mapping[str, TensorInfo],
    values: Iterator[Tensor],
    max_bytes: int,
    report: Callable[[str], None],
) -> list[str]:
    """Write tensors into safetensors files, with an index where there are several.

    Args:
        target: folder to write into.
        tensors: shape and dtype on the disk, by name.
        values: the tensors in that order, on the CPU, in any dtype; one is taken when the one before is written.
        max_bytes: most bytes of tensors in a file.
        report: gets a line for each file that is written.

    Returns:
        Names of the files, the index among them.
    """
    shards = plan_shards(tensors, max_bytes)
    for number, (file, names) in enumerate(shards.items(), 1):
        written = write_file(target / file, {name: tensors[name] for name in names}, values)
        report(f"{number}/{len(shards)}  {file}  {len(names):,} tensors, {show_size(written)}")
    if len(shards) == 1:
        return list(shards)
    index = {
        "metadata": {"total_size": sum(map(size_of, tensors.values()))},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    write_json(target / INDEX, index)
    return [*shards, INDEX]


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


def write_file(file: Path, tensors: Mapping[str, TensorInfo], values: Iterator[Tensor]) -> int:
    """Write one safetensors file; return its size in bytes. Arguments as in `write_tensors`.

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
            stream.write(_bytes(next(values), name, info))
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
