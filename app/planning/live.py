"""Counting the bytes of tensors that are alive."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class LiveBytes:
    """Bytes of the storages that are alive."""

    now: int = 0
    """Alive now."""
    peak: int = 0
    """Most since the last `restart`."""
    _known: dict[int, weakref.ref] = field(default_factory=dict)
    """By the address of the storage."""

    def observe(self, tensor: Tensor) -> None:
        """Count the storage of a tensor until it is freed; one that is counted already changes nothing."""
        self._count(tensor, tensor.untyped_storage().nbytes())

    def ignore(self, tensor: Tensor) -> None:
        """Never count the storage of a tensor."""
        self._count(tensor, 0)

    def _count(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return

        def free(_: object) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, free)
        self.now += size
        self.peak = max(self.peak, self.now)

    def add(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors and return their bytes."""
        before = self.now
        for tensor in tensors:
            self.observe(tensor)
        return self.now - before

    def restart(self) -> None:
        """Start a new peak."""
        self.peak = self.now
