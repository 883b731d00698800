"""Finds on a CPU where code would wait for a GPU: reads of values that a GPU would hold."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# Each makes the host wait for all that is queued: it returns a Python value, or a tensor whose size depends on values.
_READS = frozenset(
    "item tolist numpy cpu nonzero argwhere masked_select unique unique_consecutive equal allclose bincount is_nonzero "
    "__bool__ __float__ __int__ __index__ __format__ __contains__".split()
)
_OURS = re.compile(r"/(bpo|kernels|bpo_kernels)/(?!.*site-packages)")
_HOST_ONLY = re.compile(r"kernels/checks\.py:")
_OWN = ("tests/device_reads.py", "test_synchronisation_gpu.py", "/torch/")


class DeviceReads(TorchFunctionMode):
    """Records reads of the tensors `on_device` and of all that is computed from them.

    found: for each read its name and the functions that made it, innermost first, as FILE:NAME, without torch's own.
    """

    def __init__(self, on_device: Iterable[torch.Tensor]):
        super().__init__()
        self.found: list[list[str]] = []
        self.mark(on_device)

    @staticmethod
    def mark(tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor.on_device = True  # type: ignore[attr-defined]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        marked = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x) and hasattr(x, "on_device")]
        if marked and _is_read(getattr(func, "__name__", ""), args, kwargs):
            self.found.append([func.__name__, *callers(traceback.extract_stack())])
        result = func(*args, **kwargs)
        if marked:
            self.mark(x for x in tree_leaves(result) if torch.is_tensor(x))
        return result


def _is_read(name: str, args: Any, kwargs: Any) -> bool:
    if name == "repeat_interleave":
        return torch.is_tensor(args[1]) and kwargs.get("output_size") is None
    if name in ("__getitem__", "__setitem__"):
        return any(torch.is_tensor(x) and (x.dtype == torch.bool or x.dim() == 0) for x in tree_leaves(args[1]))
    return name in _READS


def callers(stack: Iterable[traceback.FrameSummary]) -> list[str]:
    """The functions of a stack, innermost first, as FILE:NAME, without those of torch and of tests that look on."""
    frames = reversed(list(stack))
    return [f"{frame.filename}:{frame.name}" for frame in frames if not any(own in frame.filename for own in _OWN)]


def in_own_code(found: Iterable[list[str]]) -> list[list[str]]:
    """Those that a function of bpo/ or kernels/ itself makes, without checks that read only tensors on a CPU."""
    return [read for read in found if _OURS.search(read[1]) and not _HOST_ONLY.search(read[1])]
