"""Work for the CPU is done while the model is busy: the next batch is prepared while the present one is answered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

import torch

Key = TypeVar("Key")
Batch = TypeVar("Batch")


class Prefetcher:
    """Threads that prepare, as a context. Decoding and scaling of images let go of Python's lock, so that threads do.

    Args:
        num_threads: 0 prepares each batch when it is asked for, in the caller's thread.
    """

    def __init__(self, num_threads: int):
        # One thread an operation: beside others each, operations that spread over all cores only wait for each other.
        self._pool = (
            ThreadPoolExecutor(num_threads, "prepare", lambda: torch.set_num_threads(1)) if num_threads else None
        )

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def of(
        self, batches: Iterable[tuple[Key, Batch, Sequence[Callable[[], Any]]]]
    ) -> Iterator[tuple[Key, Batch, list[Any]]]:
        """Each batch with the results of its functions; those of the next batch run while the caller has this one."""
        if self._pool is None:
            yield from ((key, batch, [function() for function in functions]) for key, batch, functions in batches)
            return
        pending: tuple[Key, Batch, list[Future[Any]]] | None = None
        for key, batch, functions in batches:
            following = key, batch, [self._pool.submit(function) for function in functions]
            if pending is not None:
                yield _finished(pending)
            pending = following
        if pending is not None:
            yield _finished(pending)


def _finished(pending: tuple[Key, Batch, list[Future[Any]]]) -> tuple[Key, Batch, list[Any]]:
    key, batch, futures = pending
    return key, batch, [future.result() for future in futures]
