"""Running PyTorch code on the meta device: tensors with shapes and no data, so that a step of any model takes seconds.

Two things are added to what torch offers. Integers that the code reads on the host (document borders) are computed for
real beside their meta tensors, so that data-dependent code runs unchanged. And the result of an operation is worked out
once per set of shapes: most meta kernels are Python, and the layers of a network repeat each other.
"""

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
_LARGEST_KNOWN = 2**22
"""Elements of the largest tensor whose values are computed."""


class UnknownValueError(RuntimeError):
    """The code reads a value on the host that depends on data."""


class MetaExecution(TorchDispatchMode):
    """Runs operations on meta tensors.

    Args:
        observe: called with every tensor an operation returns, after the operation.
    """

    _results: ClassVar[dict[tuple, list[tuple]]] = {}
    """What operations returned, shared by all runs."""

    def __init__(self, observe: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._observe = observe
        self._values: dict[int, Tensor] = {}

    def make_known(self, values: Tensor) -> Tensor:
        """Return a meta tensor like the CPU tensor `values`, whose values the code may read."""
        tensor = torch.empty_like(values, device="meta")
        self._remember(tensor, values)
        return tensor

    @contextmanager
    def running(self) -> Iterator[None]:
        """Execute what runs inside, with two functions replaced that do otherwise on the meta device than elsewhere."""
        make_tensor = torch.tensor

        def tensor(data: Any, **options: Any) -> Tensor:
            if torch.device(options.get("device") or "cpu").type != "meta":
                return make_tensor(data, **options)
            with _disable_current_modes():
                values = make_tensor(data, **{**options, "device": "cpu"})
            return self.make_known(values)  # torch would drop the values

        with (
            self,
            patch.object(torch, "tensor", tensor),
            patch.object(F, "scaled_dot_product_attention", _fused_attention),  # torch would hold all T x T scores
        ):
            yield

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default or _reads_on_host(func, kwargs):
            return self._read(func, args, kwargs)
        if func is aten.nonzero.default:
            with _disable_current_modes():
                found = func(self._value_of(args[0]))
            out = self.make_known(found)
        else:
            out = self._run(func, args, kwargs)
        for tensor in (out,) if type(out) is Tensor else tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._observe(tensor)
        return out

    def _run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        key = (func, _shapes_of(args), _shapes_of(tuple(kwargs.items())))
        made = self._results.get(key)
        if made is not None:
            outs = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in made]
            return outs[0] if len(outs) == 1 else tuple(outs)
        out = func(*args, **kwargs)
        tensors = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, tuple | list) else []
        if all(isinstance(tensor, Tensor) and tensor.is_meta for tensor in tensors):
            self._compute_values(func, args, kwargs, tensors)
            floating = all(tensor.is_floating_point() for tensor in tensors)
            if (
                tensors
                and floating
                and not isinstance(out, list)
                and _is_pure(func)
                and _makes_new_storage(args, kwargs, tensors)
            ):
                self._results[key] = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]
        return out

    # -- values -------------------------------------------------------------------------------------------------------

    def _compute_values(self, func: Any, args: tuple, kwargs: dict[str, Any], outs: list[Tensor]) -> None:
        """Compute what an operation on known integers returns; forget what an unknown one overwrites."""
        if not outs or any(out.is_floating_point() for out in outs):
            return
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        known = all(value.is_cpu or value.untyped_storage()._cdata in self._values for value in inputs)
        if not known or any(out.numel() > _LARGEST_KNOWN for out in outs):
            for out in outs:
                self._values.pop(out.untyped_storage()._cdata, None)
            return
        with _disable_current_modes():
            args, kwargs = tree_map(self._on_cpu, (args, kwargs))
            result = func(*args, **kwargs)
        for out, value in zip(outs, [result] if isinstance(result, Tensor) else result, strict=True):
            if out.untyped_storage()._cdata not in self._values:
                self._remember(out, value)

    def _remember(self, tensor: Tensor, value: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, values = storage._cdata, self._values
        values[key] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=value.dtype).copy_(value)
        weakref.finalize(storage, values.pop, key, None)

    def _on_cpu(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._value_of(value)
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def _value_of(self, tensor: Tensor) -> Tensor:
        if tensor.is_cpu:
            return tensor
        base = self._values.get(tensor.untyped_storage()._cdata)
        if base is None:
            raise UnknownValueError("the network reads a value on the host that depends on the data")
        if base.dtype != tensor.dtype:
            base = base.view(tensor.dtype)
        return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _read(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        with _disable_current_modes():
            return func(self._value_of(args[0]).clone(), *args[1:], **kwargs)


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The operation that a CPU runs (those of GPUs hold as little); it knows grouped queries by its arguments."""
    operation = aten._scaled_dot_product_flash_attention_for_cpu
    return operation(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _reads_on_host(func: Any, kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return func is aten._to_copy.default and device is not None and device.type == "cpu"


def _shapes_of(values: Any) -> Any:
    """Return what an operation's result depends on, hashable: shapes for tensors, other values with their type."""
    if isinstance(values, Tensor):
        return (values.shape, values.stride(), values.dtype, values.is_meta)
    if isinstance(values, tuple | list):
        return tuple(map(_shapes_of, values))
    return (type(values), values)


@functools.cache
def _is_pure(func: Any) -> bool:
    """Whether an operation says that it returns new tensors and changes none."""
    schema = func._schema
    return not schema.is_mutable and all(value.alias_info is None for value in schema.returns)


def _makes_new_storage(args: tuple, kwargs: dict[str, Any], outs: list[Tensor]) -> bool:
    """Whether no result shares memory with an argument or another result, and each fills its storage."""
    seen = {value.untyped_storage()._cdata for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
    for out in outs:
        storage = out.untyped_storage()
        if storage._cdata in seen or storage.nbytes() != _bytes_of(out):
            return False
        seen.add(storage._cdata)
    return True


def _bytes_of(tensor: Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
