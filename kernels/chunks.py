"""The order in which the LM head's chunks run, and the row kernels of one chunk under the GEMMs of its neighbours.

A chunk is a GEMM (logits), a kernel over its rows, and GEMMs that use what the kernel made. The kernel is bound by
memory and the GEMMs by arithmetic. With BPO_KERNELS_OVERLAP=1, on CUDA, the kernel runs on a second stream while the
first stream computes the previous chunk's product and the next chunk's logits. The operations of each chunk and their
order are the same, and so are the bits of the results; two chunks of logits are alive instead of one. Off by default:
its effect on time is not measured.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from .checks import HALVES

ENVIRONMENT_VARIABLE = "BPO_KERNELS_OVERLAP"
# Rows that a GEMM needs to be bound by arithmetic although it reads the whole weight; more chunks hide nothing more.
OVERLAP_CHUNK_ROWS = 512
OVERLAP_CHUNKS = 4

Chunk = TypeVar("Chunk")
Logits = TypeVar("Logits")
Made = TypeVar("Made")


def can_overlap(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the switch means anything here: there is nothing to win where fp32 GEMMs take so long."""
    return device.type == "cuda" and dtype in HALVES


def overlaps(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether chunks overlap: where they can and BPO_KERNELS_OVERLAP is 1.

    Raises:
        ValueError: BPO_KERNELS_OVERLAP is neither 0 nor 1.
    """
    switch = os.environ.get(ENVIRONMENT_VARIABLE) or "0"
    if switch not in ("0", "1"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE} is {switch!r}: set it to 1, or to 0 for one stream")
    return switch == "1" and can_overlap(dtype, device)


def overlapping_chunks(num_rows: int) -> int:
    """Chunks into which overlapping divides the rows, where memory asks for no more."""
    return max(1, min(OVERLAP_CHUNKS, num_rows // OVERLAP_CHUNK_ROWS))


class SecondStream:
    """A stream beside the current one. Its work begins when the work that the current one already has is done."""

    def __init__(self, device: torch.device):
        self._first = torch.cuda.current_stream(device)
        self._second = _stream(device)

    def run(self, work: Callable[[], Made]) -> tuple[Made, Any]:
        """What `work` returns, and an event after it.

        What it allocates on the second stream may go back to its pool while the first stream still reads it: the next
        work there, which alone could take that memory, waits for the first stream.
        """
        self._second.wait_stream(self._first)
        with torch.cuda.stream(self._second):
            return work(), self._second.record_event()

    def join(self, event: Any) -> None:
        """Later work of the first stream begins after `event`."""
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
    """`finish(chunk, rows(chunk, logits(chunk)))` for every chunk; with a second stream, `rows` runs there.

    Nothing of a chunk but what it stores itself is alive when the next one's logits are made (with a second stream, the
    next but one's).
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
        # With the logits: their memory is the first stream's, which must wait for their reader before it goes back.
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
