"""Bytes that a step moves and kernels that it launches.

A `TorchDispatchMode` sees each operator that PyTorch dispatches, in forward and backward. Each counts as one launch and
as the bytes of the tensors that it reads and writes, as if no cache kept anything between two operators. Operators of
`bpo_kernels` count with what their Triton implementation does on a GPU. Not seen: code compiled by torch.compile, and
Triton kernels launched outside the dispatcher. On CUDA, `kernels` counts the kernels themselves.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bpo_kernels.costs import OP_COSTS

# They only reserve memory.
_ALLOCATIONS = frozenset(
    f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
)
# They overwrite their first argument without reading it.
_OVERWRITES = frozenset(f"aten::{name}" for name in ("copy_", "fill_", "zero_", "uniform_", "normal_", "bernoulli_"))
# They read as much of their first argument as they return: rows of an embedding, selected elements.
_SELECTS = frozenset(f"aten::{name}" for name in ("embedding", "index", "index_select", "gather", "take"))
# They change as much of their first argument as their last tensor holds.
_SCATTERS = frozenset(f"aten::{name}_" for name in ("index_put", "index_add", "index_copy", "scatter", "scatter_add"))


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the distinct elements: dimensions that `expand` has repeated (stride 0) count once."""
    if tensor.layout != torch.strided:
        return tensor.numel() * tensor.element_size()
    return math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step) * tensor.element_size()


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _storages(tensors: Sequence[torch.Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors if tensor.layout == torch.strided}


def operator_cost(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> tuple[int, int]:
    """(bytes, launches) of one call of an operator; (0, 0) for views, shape queries, allocations, communication."""
    name = func._schema.name
    if name in OP_COSTS:
        return OP_COSTS[name](*args, **kwargs)
    if name in _ALLOCATIONS or name.startswith("c10d::"):
        return 0, 0
    read = written = 0
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    inputs: list[torch.Tensor] = []
    mutates = False
    for argument in func._schema.arguments:
        tensors = _tensors(given.get(argument.name))
        size = sum(map(tensor_bytes, tensors))
        is_written = bool(tensors) and argument.alias_info is not None and argument.alias_info.is_write
        inputs += tensors
        mutates |= is_written
        written += size if is_written else 0
        read += 0 if is_written and (argument.kwarg_only or name in _OVERWRITES) else size
    own = _storages(inputs)
    made = [tensor for tensor in _tensors(result) if not _storages([tensor]) <= own]
    if not made and not mutates:
        return 0, 0
    new = sum(map(tensor_bytes, made))
    if name in _SELECTS and inputs:
        read -= max(0, tensor_bytes(inputs[0]) - new)
    if name in _SCATTERS:
        unchanged = max(0, tensor_bytes(inputs[0]) - tensor_bytes(inputs[-1]))
        read, written = read - unchanged, written - unchanged
    return read + written + new, 1


@dataclass
class Traffic(TorchDispatchMode):
    """Sums of `operator_cost` over all operators inside the `with` block."""

    bytes: int = 0
    launches: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        moved, launched = operator_cost(func, args, kwargs, result)
        self.bytes += moved
        self.launches += launched
        return result


@contextlib.contextmanager
def kernels(device: torch.device) -> Iterator[Callable[[], tuple[int, float]]]:
    """Yields a function that returns, after the block, the kernels that it has run on a CUDA device, without copies:
    their number and the sum of their durations in seconds.
    """
    activities = [torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        yield lambda: _sums([event for event in profile.profiler.kineto_results.events() if _is_kernel(event)])
        torch.cuda.synchronize(device)


def _sums(events: Sequence[Any]) -> tuple[int, float]:
    return len(events), sum(event.duration_ns() for event in events) / 1e9


def _is_kernel(event: Any) -> bool:
    on_device = event.device_type() == torch.autograd.DeviceType.CUDA
    return on_device and not event.is_user_annotation() and not event.name().startswith(("Mem", "[memory]"))
