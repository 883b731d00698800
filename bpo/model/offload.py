"""Gradient checkpointing with the layers' inputs in host memory (`model.gradient_checkpointing: offload`).

`full` keeps the input of every layer on the device from its forward to its backward pass: memory that grows with
tokens times layers. Here an input is copied to pinned memory while its layer runs, and copied back one layer ahead of
its recomputation. Both copies are on a stream of their own; values are only moved, so results are those of `full`.

Shape letters: T packed tokens, D hidden size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


class _Input:
    """A layer's input: on the device while it is copied or about to be used, else in host memory only.

    Attributes:
        event: The latest copy to or from `tensor`; None on a CPU.
        before: The input of the layer before, in the same forward pass.
    """

    def __init__(self, number: int, tensor: torch.Tensor):
        self.number = number
        self.tensor: torch.Tensor | None = tensor
        self.needs_grad, self.device = tensor.requires_grad, tensor.device
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self.event: torch.cuda.Event | None = None
        self.before: Callable[[], _Input | None] = lambda: None

    def wait(self) -> None:
        """Later work of the current stream, which may reuse the memory of `tensor`, waits for its copy."""
        if self.event is not None:
            torch.cuda.current_stream(self.device).wait_event(self.event)

    def release(self) -> None:
        self.wait()
        self.tensor = None

    def __del__(self) -> None:
        if self.tensor is not None:  # a graph that is dropped without a backward pass
            self.release()


class HostInputs:
    """Runs all layers of a model under gradient checkpointing with their inputs in host memory."""

    devices: tuple[str, ...] = ("cuda",)  # on a CPU, there is nothing to gain

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._latest: _Input | None = None

    def run(self, number: int, function: Callable[..., Any], input_TD: torch.Tensor, *args: Any) -> Any:
        """`checkpoint(function, input_TD, *args)`, where `number` counts the layers in the order in which they run."""
        if input_TD.device.type not in self.devices:
            return checkpoint(function, input_TD, *args, use_reentrant=False)
        kept = self._keep(number, input_TD)
        given: list[torch.Tensor] = [input_TD]  # only for the call below: the recomputation finds it empty

        def layer(_: torch.Tensor) -> Any:
            return function(given.pop() if given else self._take(kept), *args)

        # An argument on the device, so that its random state is restored for the recomputation.
        return checkpoint(layer, input_TD.new_empty(0), use_reentrant=False)

    def _keep(self, number: int, input_TD: torch.Tensor) -> _Input:
        kept, latest = _Input(number, input_TD), self._latest
        self._copy(kept, kept.host, input_TD)
        if latest is not None:
            # Not `record_stream`: the host runs ahead of the device, so all layers' memory would be allocated before
            # the first copy is known to be complete. The layer before had the time of its computation for its copy.
            latest.release()
            if latest.number == number - 1:
                kept.before = weakref.ref(latest)
        self._latest = kept
        return kept

    def _take(self, kept: _Input) -> torch.Tensor:
        """The input on its device; starts copying that of the layer before, which the backward pass needs next."""
        if kept.tensor is None:
            self._fetch(kept)
        kept.wait()
        tensor, kept.tensor = kept.tensor, None  # a second backward pass copies it again
        assert tensor is not None
        if self._latest is kept:
            self._latest = None
        before = kept.before()
        if before is not None and before.tensor is None:
            self._fetch(before)
        return tensor.detach().requires_grad_(kept.needs_grad)

    def _fetch(self, kept: _Input) -> None:
        kept.tensor = torch.empty_like(kept.host, device=kept.device)
        self._copy(kept, kept.tensor, kept.host)

    @torch.no_grad()
    def _copy(self, kept: _Input, target: torch.Tensor, source: torch.Tensor) -> None:
        if kept.device.type != "cuda":
            target.copy_(source)
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(kept.device)
        self._stream.wait_stream(torch.cuda.current_stream(kept.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            kept.event = self._stream.record_event()
