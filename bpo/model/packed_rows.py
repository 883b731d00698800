"""What the ways of computing attention over packed rows have in common: sequences of a row, copies to the device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bpo.records import PackedLayout


class Segment(NamedTuple):
    """Rows [start, end) of a prefix or of a completion.

    A query at r sees the keys of [prefix_start, prefix_end) and of [start, r]. To a token of a prefix its own sequence
    is the prefix, and the first span is empty.
    """

    prefix_start: int
    prefix_end: int
    start: int
    end: int


def segments_of(layout: PackedLayout) -> list[Segment]:
    """Each prefix followed by its completions, in the order of the row."""
    segments = []
    for (start, prefix_end), completions in zip(layout.prefix_spans, layout.completion_spans, strict=True):
        segments.append(Segment(start, start, start, prefix_end))
        segments += [Segment(start, prefix_end, *completion) for completion in completions]
    return segments


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy that the host does not wait for: from page-locked memory on CUDA, else it would stand behind all work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
