"""Overlaps CPU work with generation: prepares the next batch while the model answers the current one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

import torch

Key = TypeVar("Key")
Batch = TypeVar("Batch")


class Prefetcher:
    """Context manager of a thread pool that prepares batches. Image decoding and scaling release the GIL.

    Args:
        num_threads: 0 prepares each batch on demand, in the caller's thread.
    """

    def __init__(self, num_threads: int):
        # One intra-op thread each: concurrent operations that each use all cores would only wait for each other.
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
        """Yields each batch with the results of its functions; those of the next batch run in the meantime."""
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
