"""Work queue of a source: batches in pieces that workers claim, and those not yet finished."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bpo.bootstrap.completion_types import candidate_keys
from bpo.bootstrap.engines.models import batch_size, engine_of
from bpo.bootstrap.job.leases import Leases
from bpo.bootstrap.job.outcomes import OutcomeReader
from bpo.bootstrap.job.spool import AnnotationSpool, Batches
from bpo.config.training import Config

# A piece is one batch, or several if there are more batches than this, since each claim is a file.
MAX_PIECES = 4096


@dataclass(frozen=True, slots=True)
class LeasedBatch:
    """A batch of a claimed piece; `ends` names the claim to release once its outcomes are written, or is None."""

    number: int
    ends: str | None = None


class SourceQueue:
    """The batches of one source; finished ones are not looked up again.

    Attributes:
        reached: Fraction of the work up to the last piece that this worker claimed.
    """

    def __init__(self, source: str, batches: Batches, reader: OutcomeReader):
        self.source, self.batches, self._reader = source, batches, reader
        self._per_piece = max(1, -(-len(batches) // MAX_PIECES))
        self._num_pieces = -(-len(batches) // self._per_piece)
        self._open = list(range(self._num_pieces))
        self.reached = 0.0
        self._mine: list[int] = []  # claimed by this worker; finished once no outcome is missing

    @property
    def num_records(self) -> int:
        return self.batches.num_records

    def num_done(self) -> int:
        """Number of outcomes of the source that the reader has found."""
        return min(self._reader.num_of(self.source), self.num_records)

    def is_finished(self) -> bool:
        """Whether every record has an outcome, as of the reader's last poll."""
        for pieces in (self._mine, self._open):
            while pieces and not self.unfinished(pieces[-1]):
                pieces.pop()
        return not self._mine and not self._open

    def unfinished(self, piece: int) -> list[int]:
        """Numbers of the batches of a piece with missing outcomes."""
        first = piece * self._per_piece
        numbers = range(first, min(first + self._per_piece, len(self.batches)))
        return [number for number in numbers if not all(self.has(number))]

    def has(self, number: int) -> list[bool]:
        """Whether each record of a batch has an outcome."""
        return [self._reader.has(self.source, digest) for digest in self.batches.digests(number)]

    def leased(self, leases: Leases) -> Iterator[LeasedBatch]:
        """Yields unfinished batches, in order, from pieces that this worker claims.

        Ends when live workers have claimed everything that is left.
        """
        while (piece := self._claim(leases)) is not None:
            *numbers, last = self.unfinished(piece)
            yield from (LeasedBatch(number) for number in numbers)
            yield LeasedBatch(last, ends=self._name(piece))

    def _claim(self, leases: Leases) -> int | None:
        """Claims the first unfinished free piece; None if there is none."""
        others: list[int] = []
        pieces = iter(self._open)
        mine: int | None = None
        for piece in pieces:
            if not self.unfinished(piece):
                continue
            if not leases.take(self._name(piece)):
                others.append(piece)
                continue
            # Its previous owner may have finished it since the last poll.
            self._reader.poll()
            if self.unfinished(piece):
                self._mine.append(mine := piece)
                self.reached = (piece + 1) / self._num_pieces
                break
            leases.release(self._name(piece))
        self._open = [*others, *pieces]
        return mine

    def _name(self, piece: int) -> str:
        # Another batch size splits the work differently.
        return f"{self.source}-{self.batches.size}x{self._per_piece}-{piece:06}"

    def missing(self) -> tuple[int, str]:
        """The number of missing outcomes and the id of the first such record (empty: none)."""
        count, first = 0, ""
        for number in range(len(self.batches)):
            has = self.has(number)
            if not all(has):
                count += has.count(False)
                first = first or self.batches[number][has.index(False)].id
        return count, first


def build_queues(annotations: AnnotationSpool, config: Config, reader: OutcomeReader) -> dict[str, SourceQueue]:
    """`candidate_key` -> the annotations in batches, in the same fair order, without refused annotations."""
    queues: dict[str, SourceQueue] = {}
    for source in config.bootstrap.queued_sources:
        is_text = source == "inject"
        batches = annotations.batches(
            batch_size(config, source),
            config.bootstrap.seed,
            limit=config.bootstrap.max_inject_records if is_text else 0,
            by_kind=is_text,  # requests with different worked examples cannot share a batch
            pads=engine_of(config, source) == "transformers",
        )
        for key in candidate_keys(source, config.bootstrap.num_candidates(source)):
            queues[key] = SourceQueue(key, batches, reader)
    return queues


def interleaved(queues: Iterable[SourceQueue], leases: Leases) -> Iterator[tuple[SourceQueue, LeasedBatch]]:
    """Batches of several queues, piece by piece, from the queue that is least far.

    If the job stops, about the same records are finished for all of them.
    """
    leased = {queue: queue.leased(leases) for queue in queues}
    while leased:
        queue = min(leased, key=lambda queue: queue.reached)
        for claimed in leased[queue]:
            yield queue, claimed
            if claimed.ends:
                break
        else:
            del leased[queue]


def is_finished(queues: dict[str, SourceQueue]) -> bool:
    """Whether every record of every source has an outcome."""
    return all(queue.is_finished() for queue in queues.values())


def lacking(queues: dict[str, SourceQueue]) -> str:
    """Describes the missing outcomes: their number and the first one."""
    missing = {source: queue.missing() for source, queue in queues.items()}
    total = sum(queue.num_records for queue in queues.values())
    first = next((f" (the first: {source} of record {record!r})" for source, (n, record) in missing.items() if n), "")
    return f"{sum(count for count, _ in missing.values())} of {total} outcomes are missing{first}"
