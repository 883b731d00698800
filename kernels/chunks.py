"""Execution order of the LM head's chunks; optional overlap of a chunk's row kernel with its neighbours' GEMMs.

A chunk is a GEMM (logits), a kernel over its rows, and GEMMs that use the kernel's output. The kernel is memory-bound
and the GEMMs are compute-bound. With BPO_KERNELS_OVERLAP=1, on CUDA, the kernel runs on a second stream while the first
stream computes the previous chunk's product and the next chunk's logits. The operations of each chunk and their order
are the same, so results are bit-identical; two chunks of logits are in memory instead of one. Off by default: the gain
is not measured.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from .checks import HALVES

ENVIRONMENT_VARIABLE = "BPO_KERNELS_OVERLAP"
# Rows that make a GEMM compute-bound although it reads the whole weight; more chunks would not hide more.
OVERLAP_CHUNK_ROWS = 512
OVERLAP_CHUNKS = 4

Chunk = TypeVar("Chunk")
Logits = TypeVar("Logits")
Made = TypeVar("Made")


def can_overlap(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the switch has an effect: there is nothing to gain next to fp32 GEMMs, which take much longer."""
    return device.type == "cuda" and dtype in HALVES


def overlaps(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether chunks overlap: if they can and BPO_KERNELS_OVERLAP is 1.

    Raises:
        ValueError: BPO_KERNELS_OVERLAP is neither 0 nor 1.
    """
    switch = os.environ.get(ENVIRONMENT_VARIABLE) or "0"
    if switch not in ("0", "1"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE} is {switch!r}: set it to 1, or to 0 for one stream")
    return switch == "1" and can_overlap(dtype, device)


def overlapping_chunks(num_rows: int) -> int:
    """Number of chunks of the rows when overlapping, unless memory requires more."""
    return max(1, min(OVERLAP_CHUNKS, num_rows // OVERLAP_CHUNK_ROWS))


class SecondStream:
    """A stream next to the current one; its work starts after the work already queued on the current one."""

    def __init__(self, device: torch.device):
        self._first = torch.cuda.current_stream(device)
        self._second = _stream(device)

    def run(self, work: Callable[[], Made]) -> tuple[Made, Any]:
        """Returns the result of `work`, and an event recorded after it.

        Memory that it allocates on the second stream may return to the pool while the first stream still reads it:
        only later work of the second stream can reuse that memory, and it waits for the first stream.
        """
        self._second.wait_stream(self._first)
        with torch.cuda.stream(self._second):
            return work(), self._second.record_event()

    def join(self, event: Any) -> None:
        """Makes later work of the first stream wait for `event`."""
        self._first.wait_event(event)


@functools.cache
def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


def run_chunks(
    chunks: Iterable[Chunk],
    logits: Callable[[Chunk], Logits],
    rows: Callable[[Chunk, Logits], Made],
    finish: Callable[[Chunk, Made], None],
    second: SecondStream | None,
) -> None:
    """Runs `finish(chunk, rows(chunk, logits(chunk)))` for every chunk; with a second stream, `rows` runs there.

    Temporaries of a chunk are freed before the next chunk's logits are made (with a second stream, before those of the
    chunk after the next).
    """
    if second is None:
        for chunk in chunks:
            finish(chunk, rows(chunk, logits(chunk)))
        return
    waiting: tuple[Any, ...] | None = None
    for chunk in chunks:
        made_logits = logits(chunk)
        made, event = second.run(functools.partial(rows, chunk, made_logits))
        if waiting is not None:
            _finish(finish, second, *waiting)
        # Includes the logits: their memory belongs to the first stream, which must wait for their reader to free it.
        waiting = chunk, made, event, made_logits
        del made, made_logits
    if waiting is not None:
        _finish(finish, second, *waiting)


def _finish(
    finish: Callable[[Any, Any], None], second: SecondStream, chunk: Any, made: Any, event: Any, logits: Any
) -> None:
    second.join(event)
    del logits
    finish(chunk, made)
