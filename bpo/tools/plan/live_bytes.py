"""Counts the bytes of live tensors, whether the graph, a checkpoint or a variable holds them; on CPU and GPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While active, tracks every storage that an operator returns until it is freed.

    `saved_tensors_hooks` would miss the inputs that a checkpoint keeps, which are not saved tensors.

    Args:
        known: Tensors whose storage is not counted, such as parameters and inputs.
        device: Count only tensors on this device type (`meta` has no memory); None counts all.

    Attributes:
        now: Live bytes.
        peak: The largest `now` since the start or `reset_peak`.
    """

    def __init__(self, known: Iterable[torch.Tensor] = (), device: str | None = None):
        super().__init__()
        self.now = 0
        self.peak = 0
        self._device = device
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, int] = {}

    def follow(self, tensors: Iterable[torch.Tensor]) -> None:
        """Also counts tensors that were not created under this mode, such as weights read from a file."""
        for tensor in tensors:
            self._follow(tensor.untyped_storage())

    def reset_peak(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._alive or self._device not in (None, storage.device.type):
            return
        self._alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self._alive.pop(key)
