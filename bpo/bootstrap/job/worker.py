"""One worker of a bootstrapping job: generates the batches that it can claim and writes their outcomes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bpo.bootstrap.engines.prefetch import Prefetcher
from bpo.bootstrap.job.broken_images import BrokenImages
from bpo.bootstrap.job.leases import Leases
from bpo.bootstrap.job.outcomes import Outcome, OutcomeReader, OutcomeWriter
from bpo.bootstrap.job.progress import ProgressBar
from bpo.bootstrap.job.queue import LeasedBatch, SourceQueue, interleaved
from bpo.bootstrap.sources import NegativeSource
from bpo.job.signals import StopRequest
from bpo.records import Annotation

_WRITE_EVERY_S = 1.0


@dataclass(frozen=True)
class Results:
    """Storage of finished outcomes: the reader of all parts and the writer of this worker's."""

    reader: OutcomeReader
    writer: OutcomeWriter
    broken: BrokenImages

    def write_as_finished(self, outcomes: Iterable[Outcome]) -> Iterator[int]:
        """Writes at the end of a batch, and every second during a long one; yields the number of outcomes written.

        Outcomes produced before an error are written.

        Raises:
            RecordError, TooManyBadRecords: see `BrokenImages.check`; the outcomes being checked are not written.
        """
        finished: list[Outcome] = []
        written_s = time.monotonic()

        def write() -> int:
            new = [outcome for outcome in finished if outcome.key not in self.reader]
            finished.clear()
            self.broken.check(new)
            self.writer.append(new)
            self.reader.poll(self.writer.path)
            return len(new)

        try:
            for outcome in outcomes:
                finished.append(outcome)
                if time.monotonic() - written_s > _WRITE_EVERY_S:
                    yield write()
                    written_s = time.monotonic()
        finally:
            write_last = write()
        yield write_last


@dataclass(frozen=True)
class Worker:
    """One worker of a job: generates the batches it can claim and shows the progress of all workers."""

    results: Results
    leases: Leases
    prefetcher: Prefetcher
    stop: StopRequest | None
    progress: bool

    def run_sources(
        self, make: Mapping[str, Callable[[], NegativeSource]], queues: Mapping[str, SourceQueue]
    ) -> dict[str, float]:
        """Generates all batches of some sources that are unfinished and unclaimed; the sources take turns.

        Args:
            make: Source -> its constructor, called only if there is a batch.

        Returns:
            Source -> seconds spent on it.
        """
        mine = {source: queues[source] for source in make}
        bars: dict[str, ProgressBar] = {}
        started_s = time.monotonic()
        with ExitStack() as stack:
            for key, batch, prepared in self.prefetcher.of(self._batches(make, mine.values())):
                queue, negatives, claimed = key
                if self.stop is not None:
                    done = ", ".join(
                        f"{q.num_done()} of {q.num_records} records of source `{s}`" for s, q in mine.items()
                    )
                    self.stop.check(f"{done} are done and kept")
                if queue.source not in bars:
                    bar = ProgressBar(queue, self.results.reader, self.progress)
                    bars[queue.source] = stack.enter_context(bar)
                with _advice_on_memory(len(batch)):
                    for number in self.results.write_as_finished(negatives.outcomes(batch, prepared)):
                        bars[queue.source].add(number)
                if claimed.ends:
                    self.leases.release(claimed.ends)
                ended_s = time.monotonic()
                bars[queue.source].seconds += ended_s - started_s
                started_s = ended_s
        return {source: bar.seconds for source, bar in bars.items()}

    def _batches(
        self, make: Mapping[str, Callable[[], NegativeSource]], queues: Iterable[SourceQueue]
    ) -> Iterator[tuple[tuple[SourceQueue, NegativeSource, LeasedBatch], list[Annotation], list[Callable[[], Any]]]]:
        """Yields each batch with its preparation functions."""
        made: dict[str, NegativeSource] = {}
        for queue, claimed in interleaved(queues, self.leases):
            if queue.source not in made:
                made[queue.source] = make[queue.source]()
            negatives = made[queue.source]
            batch = queue.batches[claimed.number]
            if not negatives.whole_batches:
                has = queue.has(claimed.number)
                batch = [annotation for annotation, there in zip(batch, has, strict=True) if not there]
            prepare: list[Callable[[], Any]] = [partial(negatives.prepare, annotation) for annotation in batch]
            yield (queue, negatives, claimed), batch, prepare


@contextmanager
def _advice_on_memory(num_records: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"out of GPU memory generating a batch of {num_records} answers; lower bootstrap.batch_size and restart: "
            "finished records are kept"
        ) from error
