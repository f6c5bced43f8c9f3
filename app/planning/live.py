"""Counting the bytes of tensors that are alive while operations run on tensors without values."""

import functools
import weakref
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that are alive of what operations return inside it, and of what it is given.

    The storages given to `watch` may change their size without an operation, as those of FSDP2's gathered weights do.
    They are looked at again where their size matters: when an operation writes into one (the first to use it) and
    before a peak is believed (less).

    FakeTensor's own bookkeeping takes most of the time of a run; what an operation returned once for tensors of certain
    layouts is made again without it.

    Args:
        mode: of the tensors.
        results: what operations returned, for runs that share it.
    """

    def __init__(self, mode: FakeTensorMode, results: dict[object, tuple]) -> None:
        super().__init__()
        self._mode, self._results = mode, results
        self.peak = 0
        """Most since the last `restart`."""
        self.watched_peak = 0
        """Most of what is watched."""
        self._now = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref] = {}
        self._watched: dict[int, torch.UntypedStorage] = {}

    @property
    def now(self) -> int:
        """Alive now."""
        self._look_again()
        return self._now

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors until they are freed, each storage once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._sizes:
                self._references[key] = weakref.ref(storage, functools.partial(self._free, key))
                self._sizes[key] = storage.nbytes()
                self._now += self._sizes[key]
        if self._now > self.peak:
            self._look_again()
            self.peak = max(self.peak, self._now)

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors whose storages may change their size, no two with the same storage."""
        tensors = list(tensors)
        self.count(tensors)
        self._watched = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}

    def restart(self) -> None:
        """Start a new peak."""
        self.peak = self.now

    def _free(self, key: int, _: object) -> None:
        self._now -= self._sizes.pop(key)
        del self._references[key]

    def _look_again(self) -> None:
        total = 0
        for key, storage in self._watched.items():
            size = storage.nbytes()
            total += size
            self._now += size - self._sizes[key]
            self._sizes[key] = size
        self.watched_peak = max(self.watched_peak, total)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.prim.device.default:  # half of all calls
            return args[0].fake_device
        out = self._run(func, types, args, kwargs or {})
        if func._schema.is_mutable and any(
            value.untyped_storage()._cdata in self._watched
            for value in tree_leaves((args, kwargs))
            if isinstance(value, Tensor)
        ):
            self._look_again()
        self.count([value for value in tree_leaves(out) if isinstance(value, Tensor)])
        return out

    def _run(self, func: Any, types: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        effect = _effect(func) if types and all(kind is FakeTensor for kind in types) else "other"
        if effect == "overwrites":
            return args[0]
        if effect == "views":
            with torch._C._DisableTorchDispatch():
                out = func(*args, **kwargs)
                views = [FakeTensor(self._mode, view, args[0].fake_device) for view in tree_leaves(out)]
            return views[0] if isinstance(out, Tensor) else views
        if effect == "other":
            return func(*args, **kwargs)
        key = func, _layout(args), _layout(kwargs)
        if key not in self._results:
            out = func(*args, **kwargs)
            storage = out.untyped_storage()
            layout = out.shape, out.stride(), out.dtype, out.fake_device
            if storage._cdata not in self._sizes and storage.nbytes() == self._make(*layout).untyped_storage().nbytes():
                self._results[key] = layout
            return out
        return self._make(*self._results[key])

    def _make(self, size: torch.Size, stride: tuple, dtype: torch.dtype, device: torch.device) -> FakeTensor:
        with torch._C._DisableTorchDispatch():
            return FakeTensor(self._mode, torch.empty_strided(size, stride, dtype=dtype, device="meta"), device)


@functools.cache
def _effect(func: Any) -> Literal["makes", "overwrites", "views", "other"]:
    """Return whether an operation only makes a tensor, writes over its first argument, or views it."""
    schema, plain = func._schema, func.namespace in ("aten", "superbolt") and torch.Tag.inplace_view not in func.tags
    if plain and func.is_view:
        return "views"
    if not plain or [str(value.type) for value in schema.returns] != ["Tensor"]:
        return "other"
    alias = schema.returns[0].alias_info
    if alias is None:
        return "other" if schema.is_mutable else "makes"
    first = schema.arguments[0].alias_info
    return "overwrites" if alias.is_write and first is not None and first.is_write else "other"


def _layout(value: Any) -> Any:
    """Return what the layout of an operation's result depends on, hashable."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, tuple | list):
        return tuple(map(_layout, value))
    if isinstance(value, dict):
        return tuple((name, _layout(item)) for name, item in value.items())
    return type(value), value
