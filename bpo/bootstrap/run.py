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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from bpo.bootstrap.engines import Engines, batch_size, needed_paths
from bpo.bootstrap.identity import check_identity
from bpo.bootstrap.merge import BootstrapSummary, beside, merge
from bpo.bootstrap.parts import Outcome, PartReader, PartWriter
from bpo.bootstrap.sources import ImageAnswers, InjectedErrors, NegativeSource
from bpo.bootstrap.validate import annotation_refusal
from bpo.config import Config
from bpo.config_bootstrap import Source
from bpo.data.formats import read_annotations
from bpo.interrupts import StopRequest
from bpo.launch import Ranks, ranks_from_environment, restart_count
from bpo.records import Annotation
from bpo.run_lock import RestartCount

logger = logging.getLogger(__name__)

Batches = Sequence[Sequence[Annotation]]

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
        return batches[self.worker :: self.num_shards * self.ranks.world_size]

    def of_shard(self, batches: Batches) -> Batches:
        size = self.ranks.world_size
        return [batch for i, batch in enumerate(batches) if i // size % self.num_shards == self.shard]


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
    file = read_annotations(Path(config.data.annotations))
    annotations = file.annotations[: config.bootstrap.limit or None]
    folder = beside(Path(config.data.groups), "parts")
    check_identity(config, folder)
    work = plan_work(annotations, config)
    reader = PartReader(folder)
    reader.poll()
    seconds: dict[str, float] = {}
    with PartWriter(folder, share.worker) as writer:
        restarts = _count_restart(config, folder, share, work, reader)
        for source, make in _sources(config, work, ranks):
            started = time.monotonic()
            mine = share.of_worker(batches_of(work[source], batch_size(config, source)))
            _run_source(make, source, mine, reader, writer, progress and ranks.is_main, stop)
            seconds[source] = time.monotonic() - started
        if ranks.is_main:
            restarts.clear()
    if share.num_shards > 1 or not ranks.is_main:
        reader.poll()
        return _rank_summary(config, len(annotations), reader, seconds)
    # Alone there is nobody to wait for.
    _wait_for_all(reader, work, config.bootstrap.stall_timeout_s if ranks.world_size > 1 else 0.0, stop)
    return merge(config, annotations, reader.outcomes, file.skipped, seconds)


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
    file = read_annotations(Path(config.data.annotations))
    annotations = file.annotations[: config.bootstrap.limit or None]
    check_identity(config, folder)
    reader = PartReader(folder)
    reader.poll()
    wanted = _wanted(plan_work(annotations, config))
    missing = wanted - reader.outcomes.keys()
    if missing:
        source, record_id = min(missing)
        raise ValueError(
            f"{folder}: {len(missing)} of {len(wanted)} outcomes are missing (the first: {source} of record "
            f"{record_id!r}); run `bpo bootstrap` again, with any number of shards: finished records are kept"
        )
    return merge(config, annotations, reader.outcomes, file.skipped, {})


def _count_restart(
    config: Config, folder: Path, share: Share, work: dict[str, list[Annotation]], reader: PartReader
) -> RestartCount:
    """Counts a start by SLURM that finds this shard no further than the one before; see `RestartCount.start`."""
    name = f"restarts-{share.shard:05d}-of-{share.num_shards:05d}.json"
    restarts = RestartCount(folder, name, progress="outcome {}", option="bootstrap.max_idle_restarts")
    if share.ranks.is_main and restart_count():
        shares = ((source, share.of_shard(batches_of(work[source], batch_size(config, source)))) for source in work)
        done = sum((source, a.id) in reader.outcomes for source, batches in shares for batch in batches for a in batch)
        restarts.start(done, config.bootstrap.max_idle_restarts)
    return restarts


def plan_work(annotations: Sequence[Annotation], config: Config) -> dict[str, list[Annotation]]:
    """Source -> the annotations it is to answer, longest first, without those that are refused themselves."""
    max_words = config.data.max_completion_words
    work: dict[str, list[Annotation]] = {}
    for source in config.bootstrap.sources:
        limit = config.bootstrap.max_inject_records if source == "inject" else 0
        usable = [a for a in annotations[: limit or None] if not annotation_refusal(a.response, max_words=max_words)]
        work[source] = sorted(usable, key=_length, reverse=True)
    return work


def batches_of(annotations: Sequence[Annotation], size: int) -> Batches:
    return [annotations[start : start + size] for start in range(0, len(annotations), size)]


def _length(annotation: Annotation) -> int:
    """Characters of prompt and answer: records that take about as long stand together."""
    return len(annotation.response) + sum(len(turn.text) for turn in annotation.prompt)


def _check_paths(config: Config) -> None:
    for name, value in needed_paths(config).items():
        if not value:
            raise ValueError(f"{name} is empty; `bpo bootstrap` needs it")


def _run_source(
    make: Callable[[], NegativeSource],
    source: str,
    batches: Batches,
    reader: PartReader,
    writer: PartWriter,
    progress: bool,
    stop: StopRequest | None,
) -> None:
    """Does this rank's unfinished batches; the model is loaded only where there is one."""
    unfinished = [b for b in batches if any((source, a.id) not in reader.outcomes for a in b)]
    if not unfinished:
        return
    negatives = make()
    if not negatives.whole_batches:
        unfinished = [[a for a in b if (source, a.id) not in reader.outcomes] for b in unfinished]
    total = sum(map(len, batches))
    finished = total - sum(map(len, unfinished))
    with tqdm(total=total, initial=finished, desc=source, unit="record", disable=not progress) as bar:
        for batch in unfinished:
            if stop is not None:
                stop.check(f"{finished} of this rank's {total} records of source `{source}` are done and kept")
            with _advice_on_memory(len(batch)):
                _write_as_finished(negatives.outcomes(batch), reader, writer, bar)
            finished += len(batch)


def _write_as_finished(outcomes: Iterable[Outcome], reader: PartReader, writer: PartWriter, bar: Any) -> None:
    """Writes outcomes at the end of a batch, or every second of a long one; what an error leaves behind is kept."""
    finished: list[Outcome] = []
    written_s = time.monotonic()

    def write() -> None:
        writer.append(outcome for outcome in finished if outcome.key not in reader.outcomes)
        bar.update(len(finished))
        finished.clear()

    try:
        for outcome in outcomes:
            finished.append(outcome)
            if time.monotonic() - written_s > _WRITE_EVERY_S:
                write()
                written_s = time.monotonic()
    finally:
        write()


def _sources(
    config: Config, work: dict[str, list[Annotation]], ranks: Ranks
) -> Iterator[tuple[str, Callable[[], NegativeSource]]]:
    """Each source with what builds it, those of one model together; `inject`, perhaps of another LLM, comes last."""
    max_images = max((len(a.images) for records in work.values() for a in records), default=1)
    engines = Engines(config, ranks, max_images)

    def image_answers(source: Source) -> Callable[[], NegativeSource]:
        return lambda: ImageAnswers(source, config, engines.vision())

    def injected_errors() -> NegativeSource:
        checks_images = set(config.bootstrap.sources) == {"inject"}
        return InjectedErrors(config, engines.text(), engines.encoder, checks_images)

    for source in config.bootstrap.sources:
        if source != "inject":
            yield source, image_answers(source)
    if "inject" in work:
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


def _wanted(work: dict[str, list[Annotation]]) -> set[tuple[str, str]]:
    return {(source, annotation.id) for source, records in work.items() for annotation in records}


def _wait_for_all(
    reader: PartReader, work: dict[str, list[Annotation]], stall_timeout_s: float, stop: StopRequest | None
) -> None:
    """Returns when every record of every source has an outcome on disk."""
    wanted = _wanted(work)
    last_news = time.monotonic()
    while True:
        if reader.poll():
            last_news = time.monotonic()
        missing = wanted - reader.outcomes.keys()
        if not missing:
            return
        if time.monotonic() - last_news > stall_timeout_s:
            source, record_id = min(missing)
            raise TimeoutError(
                f"{reader.folder}: {len(missing)} of {len(wanted)} outcomes are missing (the first: {source} of record "
                f"{record_id!r}) and none came for {stall_timeout_s:.0f} s (bootstrap.stall_timeout_s); look at the "
                "other ranks' logs, then start again: finished records are kept"
            )
        if stop is not None:
            stop.check("this rank has done its share and waited for the others'")
        time.sleep(min(_POLL_S, stall_timeout_s))


def _rank_summary(
    config: Config, num_annotations: int, reader: PartReader, seconds: dict[str, float]
) -> BootstrapSummary:
    kept: dict[str, int] = {source: 0 for source in config.bootstrap.sources}
    refused: dict[str, dict[str, int]] = {}
    quarantined: list[Outcome] = []
    for outcome in reader.outcomes.values():
        if outcome.status == "kept":
            kept[outcome.source] = kept.get(outcome.source, 0) + 1
        elif outcome.status == "refused":
            reasons = refused.setdefault(outcome.source, {})
            reasons[outcome.reason] = reasons.get(outcome.reason, 0) + 1
        else:
            quarantined.append(outcome)
    return BootstrapSummary(config.data.groups, num_annotations, None, kept, refused, len(quarantined), 0, {}, seconds)
