"""Progress of all workers of a job: answers per second and remaining time."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm  # type: ignore[import-untyped]

from bpo.bootstrap.job.outcomes import OutcomeReader
from bpo.bootstrap.job.queue import SourceQueue

logger = logging.getLogger(__name__)

_POLL_EVERY_S = 5.0
# A log file keeps every update of a bar.
_MIN_INTERVAL_S = 0.5 if sys.stderr.isatty() else 30.0


class ProgressBar:
    """A progress bar over the answers of all workers for one source, as a context; logs one line at its end.

    Attributes:
        num_done: Known outcomes of all workers.
        seconds: Time that this worker spent on the source, kept by the caller.
    """

    def __init__(self, queue: SourceQueue, reader: OutcomeReader, shown: bool):
        self._queue, self._reader = queue, reader
        self.num_done = queue.num_done()
        self.seconds = 0.0
        self._num_own, self._polled_s = 0, time.monotonic()
        self._bar = tqdm(
            total=queue.num_records,
            initial=self.num_done,
            desc=queue.source,
            unit="answer",
            mininterval=_MIN_INTERVAL_S,
            disable=not shown,
        )

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        logger.info(
            "%s: %d answers by this rank in %.1f s, %.1f per second; %d of %d finished",
            *(self._queue.source, self._num_own, self.seconds, self._num_own / max(self.seconds, 1e-9)),
            *(self.num_done, self._queue.num_records),
        )

    def add(self, written: int) -> None:
        """Counts outcomes written by this worker; every few seconds polls those of the others."""
        self._num_own += written
        if time.monotonic() - self._polled_s > _POLL_EVERY_S:
            self._reader.poll()
            self._polled_s = time.monotonic()
        done = self._queue.num_done()
        self._bar.update(done - self.num_done)
        self.num_done = done
