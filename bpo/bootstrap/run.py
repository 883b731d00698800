"""`bpo bootstrap`: annotations and images in, preference groups out; sharded over ranks and jobs, always resumable.

Batches are made once from all records, longest first (memory runs short at once or never), and dealt to the workers in
turn: the ranks of one job, or of all jobs that share the work (bootstrap.num_shards, an array of SLURM). A batch is
always generated whole, so that with one batch size not even the rounding of batched matrix products depends on the
number of workers or on where an earlier run was killed. They meet only through files: rank 0 merges when every record
has an outcome; with several shards, `bpo merge` does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from bpo.bootstrap.broken import BrokenRecords
from bpo.bootstrap.engines import Engines, batch_size, needed_paths
from bpo.bootstrap.identity import check_identity
from bpo.bootstrap.merge import BootstrapSummary, beside, merge
from bpo.bootstrap.parts import Outcome, PartReader, PartWriter
from bpo.bootstrap.sources import ImageAnswers, InjectedErrors, NegativeSource
from bpo.bootstrap.spool import AnnotationSpool, Batches
from bpo.config import Config
from bpo.config_bootstrap import Source
from bpo.data.bad_records import BadRecords
from bpo.data.formats import iterate_annotations
from bpo.interrupts import StopRequest
from bpo.launch import Ranks, ranks_from_environment, restart_count
from bpo.run_lock import RestartCount

logger = logging.getLogger(__name__)

_POLL_S = 2.0
_WRITE_EVERY_S = 1.0


@dataclass(frozen=True)
class Share:
    """Which of all batches are whose: every rank of every shard is a worker."""

    shard: int
    num_shards: int
    ranks: Ranks

    @property
    def worker(self) -> int:
        return self.shard * self.ranks.world_size + self.ranks.rank

    def of_worker(self, batches: Batches) -> Batches:
        return self._every(batches, self.worker)

    def of_shard(self, batches: Batches) -> list[Batches]:
        """The batches of each worker of this shard."""
        first = self.shard * self.ranks.world_size
        return [self._every(batches, worker) for worker in range(first, first + self.ranks.world_size)]

    def _every(self, batches: Batches, first: int) -> Batches:
        return batches[first :: self.num_shards * self.ranks.world_size]


def run_bootstrap(config: Config, progress: bool = True, stop: StopRequest | None = None) -> BootstrapSummary:
    """Makes the configured negatives for every annotation and writes `data.groups` with its lists and summary.

    A killed job goes on where it was when it is started again, also with another number of ranks, shards or batch size.

    Returns:
        The summary; on ranks other than 0, and with several shards, that of the outcomes this rank can see, without
        groups.

    Raises:
        ValueError: A path is missing, an option changed against unfinished results, another process works on them, or
            no annotation got a usable negative.
        TimeoutError: On rank 0, when the other ranks' results stop coming.
        Interrupted: `stop` came; every finished batch is kept.
        NoProgressError: SLURM starts the job again and again, and no batch gets finished.
    """
    ranks = ranks_from_environment()
    share = Share(config.bootstrap.shard_index, config.bootstrap.num_shards, ranks)
    _check_paths(config)
    skipped: dict[str, list[str]] = {}
    bad = BadRecords.of(config.data)
    annotations = _spooled(config, bad, skipped)
    folder = beside(Path(config.data.groups), "parts")
    check_identity(config, folder)
    work = plan_work(annotations, config)
    reader = PartReader(folder)
    reader.poll()
    seconds: dict[str, float] = {}
    broken = BrokenRecords(config.data, len(annotations), bad, folder, reader.broken())
    with PartWriter(folder, share.worker) as writer:
        restarts = _count_restart(config, folder, share, work, reader)
        for source, make in _sources(config, annotations.most_images, ranks):
            started = time.monotonic()
            mine = share.of_worker(work[source])
            results = Results(reader, writer, broken)
            _run_source(make, source, mine, results, progress and ranks.is_main, stop)
            seconds[source] = time.monotonic() - started
        if ranks.is_main:
            restarts.clear()
    if share.num_shards > 1 or not ranks.is_main:
        reader.poll()
        return _rank_summary(config, len(annotations), reader, seconds)
    # Alone there is nobody to wait for.
    _wait_for_all(reader, work, config.bootstrap.stall_timeout_s if ranks.world_size > 1 else 0.0, stop)
    return merge(config, annotations, reader, skipped, seconds, bad)


def run_merge(config: Config) -> BootstrapSummary:
    """`bpo merge`: writes `data.groups` with its lists and summary from what all shards have finished.

    Raises:
        ValueError: A path is missing, an option changed since, an outcome is missing, or no annotation got a usable
            negative.
    """
    _check_paths(config)
    folder = beside(Path(config.data.groups), "parts")
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist: there is nothing to merge; run `bpo bootstrap` first")
    skipped: dict[str, list[str]] = {}
    bad = BadRecords.of(config.data)
    annotations = _spooled(config, bad, skipped)
    check_identity(config, folder)
    reader = PartReader(folder)
    reader.poll()
    lacking = _Lacking(plan_work(annotations, config), reader)
    if not lacking.all_there():
        raise ValueError(
            f"{folder}: {lacking.told()}; run `bpo bootstrap` again, with any number of shards: finished records are "
            "kept"
        )
    return merge(config, annotations, reader, skipped, {}, bad)


def _spooled(config: Config, bad: BadRecords, skipped: dict[str, list[str]]) -> AnnotationSpool:
    annotations = iterate_annotations(Path(config.data.annotations), bad, skipped)
    return AnnotationSpool(annotations, config.bootstrap.limit, config.data.max_completion_words)


def _count_restart(
    config: Config, folder: Path, share: Share, work: dict[str, Batches], reader: PartReader
) -> RestartCount:
    """Counts a start by SLURM that finds this shard no further than the one before; see `RestartCount.start`."""
    name = f"restarts-{share.shard:05d}-of-{share.num_shards:05d}.json"
    restarts = RestartCount(folder, name, progress="outcome {}", option="bootstrap.max_idle_restarts")
    if share.ranks.is_main and restart_count():
        shares = ((source, batches) for source in work for batches in share.of_shard(work[source]))
        done = sum(reader.has(source, one) for source, batches in shares for one in batches.all_digests())
        restarts.start(done, config.bootstrap.max_idle_restarts)
    return restarts


def plan_work(annotations: AnnotationSpool, config: Config) -> dict[str, Batches]:
    """Source -> the annotations it is to answer in batches, longest first, without those refused themselves."""
    limits = {"inject": config.bootstrap.max_inject_records}
    return {
        source: Batches(annotations, annotations.longest_first(limits.get(source, 0)), batch_size(config, source))
        for source in config.bootstrap.sources
    }


def _check_paths(config: Config) -> None:
    for name, value in needed_paths(config).items():
        if not value:
            raise ValueError(f"{name} is empty; `bpo bootstrap` needs it")


@dataclass(frozen=True)
class Results:
    """Where finished outcomes go, and what is there already."""

    reader: PartReader
    writer: PartWriter
    broken: BrokenRecords

    def write_as_finished(self, outcomes: Iterable[Outcome], bar: Any) -> None:
        """Writes at the end of a batch, or every second of a long one; what an error leaves behind is kept.

        Raises:
            RecordError, TooManyBadRecords: see `BrokenRecords.check`; the outcomes it looked at are not kept.
        """
        finished: list[Outcome] = []
        written_s = time.monotonic()

        def write() -> None:
            new = [outcome for outcome in finished if outcome.key not in self.reader]
            bar.update(len(finished))
            finished.clear()
            self.broken.check(new)
            self.writer.append(new)

        try:
            for outcome in outcomes:
                finished.append(outcome)
                if time.monotonic() - written_s > _WRITE_EVERY_S:
                    write()
                    written_s = time.monotonic()
        finally:
            write()


def _run_source(
    make: Callable[[], NegativeSource],
    source: str,
    batches: Batches,
    results: Results,
    progress: bool,
    stop: StopRequest | None,
) -> None:
    """Does this rank's unfinished batches; the model is loaded only where there is one."""
    reader = results.reader
    done = [[reader.has(source, one) for one in batches.digests(number)] for number in range(len(batches))]
    unfinished = [number for number, each in enumerate(done) if not all(each)]
    if not unfinished:
        return
    negatives = make()
    total = batches.num_records
    finished = total - sum(len(done[n]) if negatives.whole_batches else done[n].count(False) for n in unfinished)
    with tqdm(total=total, initial=finished, desc=source, unit="record", disable=not progress) as bar:
        for number in unfinished:
            batch = batches[number]
            if not negatives.whole_batches:
                batch = [annotation for annotation in batch if (source, annotation.id) not in reader]
            if stop is not None:
                stop.check(f"{finished} of this rank's {total} records of source `{source}` are done and kept")
            with _advice_on_memory(len(batch)):
                results.write_as_finished(negatives.outcomes(batch), bar)
            finished += len(batch)


def _sources(config: Config, max_images: int, ranks: Ranks) -> Iterator[tuple[str, Callable[[], NegativeSource]]]:
    """Each source with what builds it, those of one model together; `inject`, perhaps of another LLM, comes last."""
    engines = Engines(config, ranks, max_images)

    def image_answers(source: Source) -> Callable[[], NegativeSource]:
        return lambda: ImageAnswers(source, config, engines.vision())

    def injected_errors() -> NegativeSource:
        checks_images = set(config.bootstrap.sources) == {"inject"}
        return InjectedErrors(config, engines.text(), engines.encoder, checks_images)

    for source in config.bootstrap.sources:
        if source != "inject":
            yield source, image_answers(source)
    if "inject" in config.bootstrap.sources:
        yield "inject", injected_errors


@contextmanager
def _advice_on_memory(num_records: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"the GPU's memory does not hold a batch of {num_records} answers; lower bootstrap.batch_size and start "
            "again: finished records are kept"
        ) from error


class _Lacking:
    """Which outcomes of the work are not on disk; what was found once is not looked for again."""

    def __init__(self, work: dict[str, Batches], reader: PartReader):
        self._work, self._reader = work, reader
        self._wanted = ((source, one) for source, batches in work.items() for one in batches.all_digests())
        self._next = next(self._wanted, None)

    def all_there(self) -> bool:
        while self._next is not None and self._reader.has(*self._next):
            self._next = next(self._wanted, None)
        return self._next is None

    def told(self) -> str:
        """How many, and which comes first."""
        missing: list[tuple[str, str]] = []
        total = num_missing = 0
        for source, batches in self._work.items():
            for number in range(len(batches)):
                lacks = [not self._reader.has(source, one) for one in batches.digests(number)]
                total += len(lacks)
                num_missing += sum(lacks)
                if any(lacks) and not missing:
                    missing.append((source, batches[number][lacks.index(True)].id))
        first = f" (the first: {missing[0][0]} of record {missing[0][1]!r})" if missing else ""
        return f"{num_missing} of {total} outcomes are missing{first}"


def _wait_for_all(
    reader: PartReader, work: dict[str, Batches], stall_timeout_s: float, stop: StopRequest | None
) -> None:
    """Returns when every record of every source has an outcome on disk."""
    lacking = _Lacking(work, reader)
    last_news = time.monotonic()
    while True:
        if reader.poll():
            last_news = time.monotonic()
        if lacking.all_there():
            return
        if time.monotonic() - last_news > stall_timeout_s:
            raise TimeoutError(
                f"{reader.folder}: {lacking.told()} and none came for {stall_timeout_s:.0f} s "
                "(bootstrap.stall_timeout_s); look at the other ranks' logs, then start again: finished records are "
                "kept"
            )
        if stop is not None:
            stop.check("this rank has done its share and waited for the others'")
        time.sleep(min(_POLL_S, stall_timeout_s))


def _rank_summary(
    config: Config, num_annotations: int, reader: PartReader, seconds: dict[str, float]
) -> BootstrapSummary:
    kept: dict[str, int] = {source: 0 for source in config.bootstrap.sources}
    refused: dict[str, dict[str, int]] = {}
    num_quarantined = 0
    for (source, status, reason), count in reader.counts().items():
        if status == "kept":
            kept[source] = kept.get(source, 0) + count
        elif status == "refused":
            refused.setdefault(source, {})[reason] = count
        else:
            num_quarantined += count
    return BootstrapSummary(config.data.groups, num_annotations, None, kept, refused, num_quarantined, 0, {}, seconds)
