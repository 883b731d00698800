"""Micro-batches on the device: the copy of the next one runs while the present one is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

from bpo.records import GroupBatch

S = TypeVar("S")
T = TypeVar("T")


def on_device(batches: Iterable[GroupBatch], device: torch.device, dtype: torch.dtype) -> Iterator[GroupBatch]:
    """The batches on `device`, pixels in `dtype`, in order.

    On a GPU one batch is copied ahead, on a stream of its own and from page-locked memory, so that copying and
    computing overlap; that batch's memory on the device is the price. Elsewhere nothing is copied or made ahead.
    """
    if device.type != "cuda":
        return (batch.to(device, dtype) for batch in batches)
    stream = torch.cuda.Stream(device)

    def start(batch: GroupBatch) -> tuple[GroupBatch, torch.cuda.Event]:
        pinned = batch.pin_memory()  # what a pin thread has not done, such as the reference's log-probs
        with torch.cuda.stream(stream):
            moved = pinned.to(device, dtype)
            return moved, stream.record_event()

    def finish(started: tuple[GroupBatch, torch.cuda.Event]) -> GroupBatch:
        moved, copied = started
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)  # not the stream: the next batch's copy is on it already
        for tensor in moved.tensors():
            tensor.record_stream(current)  # else the copy after next could get this memory while it is being read
        return moved

    return one_ahead(batches, start, finish)


def one_ahead(items: Iterable[S], start: Callable[[S], Any], finish: Callable[[Any], T]) -> Iterator[T]:
    """Each item started and finished, in order; an item is started before its predecessor is handed out."""
    started: list[Any] = []
    for item in items:
        started.append(start(item))
        if len(started) == 2:
            yield finish(started.pop(0))
    for last in started:
        yield finish(last)
