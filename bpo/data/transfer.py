"""Moves micro-batches to the device; the next one is copied while the current one is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

from bpo.records import GroupBatch

S = TypeVar("S")
T = TypeVar("T")


def on_device(batches: Iterable[GroupBatch], device: torch.device, dtype: torch.dtype) -> Iterator[GroupBatch]:
    """Yields the batches on `device`, pixels in `dtype`, in order.

    On a GPU one batch is copied ahead, on a separate stream and from page-locked memory, so that copies and computation
    overlap, at the cost of that batch's device memory. On other devices nothing is prepared ahead.
    """
    if device.type != "cuda":
        return (batch.to(device, dtype) for batch in batches)
    stream = torch.cuda.Stream(device)

    def start(batch: GroupBatch) -> tuple[GroupBatch, torch.cuda.Event]:
        pinned = batch.pin_memory()  # for tensors not pinned by a pin thread, such as the reference's log-probs
        with torch.cuda.stream(stream):
            moved = pinned.to(device, dtype)
            return moved, stream.record_event()

    def finish(started: tuple[GroupBatch, torch.cuda.Event]) -> GroupBatch:
        moved, copied = started
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)  # not the stream, which already has the next batch's copy
        for tensor in moved.tensors():
            tensor.record_stream(current)  # otherwise a later copy could reuse this memory while it is read
        return moved

    return one_ahead(batches, start, finish)


def one_ahead(items: Iterable[S], start: Callable[[S], Any], finish: Callable[[Any], T]) -> Iterator[T]:
    """Starts and finishes each item, in order; each is started before its predecessor is yielded."""
    started: list[Any] = []
    for item in items:
        started.append(start(item))
        if len(started) == 2:
            yield finish(started.pop(0))
    for last in started:
        yield finish(last)
