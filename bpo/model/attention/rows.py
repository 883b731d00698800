"""Helpers of the attention backends: segments and sequences of a packed row, copies to the device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bpo.records import PackedLayout


class Segment(NamedTuple):
    """Rows [start, end) of a prefix or of a completion.

    A query at r attends to the keys of [prefix_start, prefix_end) and of [start, r]. For a prefix, the first span is
    empty.
    """

    prefix_start: int
    prefix_end: int
    start: int
    end: int


def segments_of(layout: PackedLayout) -> list[Segment]:
    """Each prefix followed by its completions, in row order."""
    segments = []
    for (start, prefix_end), completions in zip(layout.prefix_spans, layout.completion_spans, strict=True):
        segments.append(Segment(start, start, start, prefix_end))
        segments += [Segment(start, prefix_end, *completion) for completion in completions]
    return segments


class CausalSequence(NamedTuple):
    """Queries at rows [start, end) of a packed row, and the spans of rows of their keys, in order.

    The mask is causal and aligned bottom-right: the last query attends to all keys.
    """

    start: int
    end: int
    key_spans: tuple[tuple[int, int], ...]

    @property
    def num_queries(self) -> int:
        return self.end - self.start

    @property
    def num_keys(self) -> int:
        return sum(end - start for start, end in self.key_spans)


def causal_sequences(layout: PackedLayout) -> list[CausalSequence]:
    """The sequences of a row: each prefix with its first completion, then each further completion with its prefix."""
    sequences = []
    for prefix, completions in zip(layout.prefix_spans, layout.completion_spans, strict=True):
        whole = (prefix[0], completions[0][1] if completions else prefix[1])
        sequences.append(CausalSequence(*whole, (whole,)))
        sequences += [CausalSequence(*completion, (prefix, completion)) for completion in completions[1:]]
    return sequences


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """An asynchronous copy; on CUDA, from page-locked memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
