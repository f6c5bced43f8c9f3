"""Counting the bytes of tensors that are alive while operations run."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that are alive of what operations return inside it, and of what it is given.

    The storages given to `watch` may change their size without an operation, as those of FSDP2's gathered weights do.
    They are looked at again where their size matters: when an operation writes (the first to use more memory) and
    before a peak is believed (less).
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        """Most since the last `restart`."""
        self.watched_peak = 0
        """Most of what is watched."""
        self._now = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref] = {}
        self._watched: list[torch.UntypedStorage] = []

    @property
    def now(self) -> int:
        """Alive now."""
        self._look_again()
        return self._now

    def count(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors until they are freed, each storage once, and return the bytes of those that were not."""
        added = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._sizes:
                self._references[key] = weakref.ref(storage, lambda _, key=key: self._free(key))
                self._sizes[key] = size = storage.nbytes()
                added += size
        self._now += added
        if self._now > self.peak:
            self._look_again()
            self.peak = max(self.peak, self._now)
        return added

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors whose storages may change their size."""
        tensors = list(tensors)
        self._watched += {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}.values()
        self.count(tensors)

    def restart(self) -> None:
        """Start a new peak."""
        self.peak = self.now

    def _free(self, key: int) -> None:
        self._now -= self._sizes.pop(key)
        del self._references[key]

    def _look_again(self) -> None:
        total = 0
        for storage in self._watched:
            size = storage.nbytes()
            total += size
            self._now += size - self._sizes[storage._cdata]
            self._sizes[storage._cdata] = size
        self.watched_peak = max(self.watched_peak, total)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.prim.device.default:  # half of all calls
            return args[0].fake_device
        out = func(*args, **(kwargs or {}))
        if func._schema.is_mutable:
            self._look_again()
        self.count([value for value in tree_leaves(out) if isinstance(value, Tensor)])
        return out
