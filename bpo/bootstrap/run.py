"""`bpo bootstrap`: builds preference groups from annotations and images; sharded over ranks and jobs, resumable.

All records are batched once, in an order in which any prefix is a fair sample (`job/order.py`); the first batch has the
longest record, so that an out-of-memory error occurs at the start or not at all. Workers (the ranks of one job, or of
all jobs of a SLURM array, `bootstrap.num_shards`) claim batches in that order: slow workers claim fewer, and leases of
dead workers are taken over. Sources take turns, so that a job that stops has about the same records for all of them;
only an LLM that is loaded for `inject` alone waits until the multimodal model has finished. A batch is always generated
whole, so for a given batch size even the rounding of batched matrix products is independent of the number of workers
and of where a run was killed. Workers communicate through files only. Rank 0 merges when every record has an outcome;
for several shards, `bpo merge`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bpo.bootstrap.completion_types import candidate_key, source_of
from bpo.bootstrap.engines.models import Generators, num_prepare_threads, required_paths
from bpo.bootstrap.engines.prefetch import Prefetcher
from bpo.bootstrap.inject import choose_mode
from bpo.bootstrap.job.broken_images import BrokenImages
from bpo.bootstrap.job.identity import SourceIdentities, check_identity
from bpo.bootstrap.job.leases import Leases
from bpo.bootstrap.job.merge import BootstrapSummary, merge, sibling_path
from bpo.bootstrap.job.outcomes import OutcomeReader, OutcomeWriter
from bpo.bootstrap.job.queue import SourceQueue, build_queues, is_finished, lacking
from bpo.bootstrap.job.spool import AnnotationSpool
from bpo.bootstrap.job.worker import Results, Worker
from bpo.bootstrap.measure.hardness import ObjectTruth
from bpo.bootstrap.plugin import REGISTERED, load_sources
from bpo.bootstrap.sources import ImageAnswers, InjectedErrors, NegativeSource
from bpo.bootstrap.whole_set.blind import BlindScores
from bpo.config.bootstrap import Source
from bpo.config.training import Config
from bpo.data.parts import in_part
from bpo.formats.bad_records import BadRecords
from bpo.formats.files import iterate_annotations
from bpo.job.compile_locks import named_compile_locks
from bpo.job.launch import Ranks, ranks_from_environment, restart_count
from bpo.job.restarts import RestartCount
from bpo.job.signals import StopRequest

logger = logging.getLogger(__name__)

_POLL_S = 2.0


@dataclass(frozen=True)
class Share:
    """This worker's place among all workers: one per rank of every shard."""

    shard: int
    num_shards: int
    ranks: Ranks

    @property
    def worker(self) -> int:
        return self.shard * self.ranks.world_size + self.ranks.rank

    @property
    def workers_of_shard(self) -> range:
        first = self.shard * self.ranks.world_size
        return range(first, first + self.ranks.world_size)

    @property
    def merges(self) -> bool:
        """Whether this worker waits for all others and merges; several shards are merged by `bpo merge`."""
        return self.ranks.is_main and self.num_shards == 1


@named_compile_locks()
def run_bootstrap(
    config: Config, progress: bool = True, stop: StopRequest | None = None, truth: ObjectTruth | None = None
) -> BootstrapSummary:
    """Generates the configured negatives for every annotation and writes `data.groups` with its lists and summary.

    A restarted job resumes from its finished records, also with another number of ranks, shards or batch size.

    Args:
        truth: Objects in the images, if known; see `merge`.

    Returns:
        The summary; on ranks other than 0, and with several shards, it covers the outcomes visible to this rank and
        has no group count.

    Raises:
        ValueError: A path is missing, an option differs from that of the unfinished results, another process is
            writing them, or no annotation got a usable negative.
        TimeoutError: On rank 0, if the other ranks stop producing results.
        Interrupted: `stop` was received; every finished batch is kept.
        NoProgressError: SLURM restarted the job repeatedly without a finished batch in between.
    """
    ranks = ranks_from_environment()
    share = Share(config.bootstrap.shard_index, config.bootstrap.num_shards, ranks)
    _check_paths(config)
    load_sources(config.bootstrap)
    skipped: dict[str, list[str]] = {}
    bad = BadRecords.from_config(config.data)
    annotations = _spooled(config, bad, skipped)
    folder = sibling_path(Path(config.data.groups), "parts")
    identities = check_identity(config, folder)
    reader = _read(folder, identities)
    queues = build_queues(annotations, config, reader)
    seconds: dict[str, float] = dict.fromkeys(config.bootstrap.queued_sources, 0.0)
    broken = BrokenImages(config.data, len(annotations), bad, folder, reader.broken())
    leases = Leases(folder / "claims", f"worker-{share.worker:05d}", config.bootstrap.claim_timeout_s)
    with (
        OutcomeWriter(folder, share.worker, identities.mark) as writer,
        leases,
        Prefetcher(num_prepare_threads(config)) as prefetcher,
    ):
        restarts = _count_restart(config, folder, share, queues, reader)
        worker = Worker(Results(reader, writer, broken), leases, prefetcher, stop, progress and ranks.is_main)
        stall = StallTimeout(config.bootstrap.stall_timeout_s)
        while True:
            for sources in _sources(config, annotations, ranks):
                for key, spent_s in worker.run_sources(sources, queues).items():
                    seconds[source_of(key)] += spent_s
            reader.poll()
            if not share.merges or is_finished(queues):
                break
            # Live workers hold the remaining leases: the batches will be finished, or become available again.
            stall.wait(reader, queues, stop)
        if ranks.is_main:
            restarts.clear()
    if not share.merges:
        return _rank_summary(config, len(annotations), reader, seconds)
    return merge(config, annotations, reader, skipped, seconds, bad, truth=truth)


def run_merge(config: Config, partial: bool = False, truth: ObjectTruth | None = None) -> BootstrapSummary:
    """`bpo merge`: writes `data.groups` with its lists and summary from the outcomes of all shards.

    Args:
        partial: Use what is finished. The job may be running; nothing of it is changed.
        truth: Objects in the images, if known; see `merge`.

    Raises:
        ValueError: A path is missing, an option was changed, an outcome is missing, or no annotation got a usable
            negative.
    """
    _check_paths(config)
    load_sources(config.bootstrap)
    folder = sibling_path(Path(config.data.groups), "parts")
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist: nothing to merge; run `bpo bootstrap` first")
    skipped: dict[str, list[str]] = {}
    bad = BadRecords.from_config(config.data)
    annotations = _spooled(config, bad, skipped)
    reader = _read(folder, check_identity(config, folder, reads_only=True))
    queues = build_queues(annotations, config, reader)
    if partial and len(reader) and not is_finished(queues):
        unfinished = {source: queue.missing()[0] for source, queue in queues.items()}
        summary = merge(config, annotations, reader, skipped, {}, bad, unfinished, truth)
        reader.poll()
        if not is_finished(queues):
            return summary
        # The job has ended in the meantime, and these files may have replaced those of its own merge: merge again.
    if not is_finished(queues):
        hint = "" if partial else ", or merge what is finished with --partial"
        raise ValueError(
            f"{folder}: {lacking(queues)}; rerun `bpo bootstrap` with any number of shards: finished records are "
            f"kept{hint}"
        )
    return merge(config, annotations, reader, skipped, {}, bad, truth=truth)


def _read(folder: Path, identities: SourceIdentities) -> OutcomeReader:
    """The outcomes of the job's options; logs the number of others."""
    reader = OutcomeReader(folder, identities.accepts)
    reader.poll()
    for source, count in reader.num_unused.items():
        if source_of(source) in identities.current:
            logger.info("%s: %d outcomes of `%s` with other options are kept, not used", folder, count, source)
    return reader


def _spooled(config: Config, bad: BadRecords, skipped: dict[str, list[str]]) -> AnnotationSpool:
    part, mode = config.data.part, config.bootstrap.inject.mode
    annotations = iterate_annotations(Path(config.data.annotations), bad, skipped)
    spool = AnnotationSpool(
        (annotation for annotation in annotations if in_part(annotation.id, part)),
        config.bootstrap.limit,
        config.data.max_completion_words,
        kind_of=lambda annotation: int(choose_mode(mode, annotation) == "qa"),
    )
    bad.problems = [problem for problem in bad.problems if in_part(problem.record_id or problem.where, part)]
    return spool


def _count_restart(
    config: Config, folder: Path, share: Share, queues: dict[str, SourceQueue], reader: OutcomeReader
) -> RestartCount:
    """Counts a restart by SLURM if this shard made no progress since the last one; see `RestartCount.start`."""
    name = f"restarts-{share.shard:05d}-of-{share.num_shards:05d}.json"
    restarts = RestartCount(folder, name, progress="outcome {}", option="bootstrap.max_idle_restarts")
    if share.ranks.is_main and restart_count() and not is_finished(queues):
        done = sum(reader.num_by(worker) for worker in share.workers_of_shard)
        restarts.start(done, config.bootstrap.max_idle_restarts)
    return restarts


def _check_paths(config: Config) -> None:
    for name, value in required_paths(config).items():
        if not value:
            raise ValueError(f"{name} is empty; `bpo bootstrap` requires it")


def _sources(
    config: Config, annotations: AnnotationSpool, ranks: Ranks
) -> Iterator[dict[str, Callable[[], NegativeSource]]]:
    """Yields the sources that take turns, with their constructors: all, except for a second model in memory."""
    generators = Generators(config, ranks, annotations.most_images)

    def image_answers(source: Source, candidate: int) -> Callable[[], NegativeSource]:
        make = REGISTERED.get(source, partial(ImageAnswers, source))
        return lambda: make(config, generators.vision(), candidate)

    def injected_errors(candidate: int) -> NegativeSource:
        checks_images = set(config.bootstrap.generated_sources) == {"inject"}
        return InjectedErrors(config, generators.text(), generators.encoder, checks_images, candidate)

    options = config.bootstrap
    images: list[Source] = [source for source in options.generated_sources if source != "inject"]
    sources: dict[str, Callable[[], NegativeSource]] = {
        candidate_key(source, candidate): image_answers(source, candidate)
        for source in images
        for candidate in range(options.num_candidates(source))
    }
    if "inject" in options.sources:
        if options.inject.llm and options.vision.engine != "server":
            yield sources
            sources = {}
        sources |= {
            candidate_key("inject", candidate): partial(injected_errors, candidate)
            for candidate in range(options.num_candidates("inject"))
        }
    yield sources
    if "edit" in options.queued_sources:  # the same weights with the attention of training
        yield {"edit": lambda: BlindScores(config, annotations, generators.scorer())}


class StallTimeout:
    """Waits for outcomes of other workers; times out if none arrives for `stall_timeout_s`."""

    def __init__(self, stall_timeout_s: float):
        self._stall_timeout_s = stall_timeout_s
        self._num_known, self._last_change_s = -1, 0.0

    def wait(self, reader: OutcomeReader, queues: dict[str, SourceQueue], stop: StopRequest | None) -> None:
        """Sleeps for one polling interval.

        Raises:
            TimeoutError: No new outcome for `stall_timeout_s`.
            Interrupted: `stop` was received.
        """
        if stop is not None:
            stop.check("this rank has finished its share and was waiting for the others")
        if self._num_known != len(reader):
            self._num_known, self._last_change_s = len(reader), time.monotonic()
        elif time.monotonic() - self._last_change_s > self._stall_timeout_s:
            raise TimeoutError(
                f"{reader.folder}: {lacking(queues)} and the workers that claimed them wrote none for "
                f"{self._stall_timeout_s:.0f} s (bootstrap.stall_timeout_s); check the other ranks' logs, then "
                "restart: finished records are kept"
            )
        time.sleep(min(_POLL_S, self._stall_timeout_s))


def _rank_summary(
    config: Config, num_annotations: int, reader: OutcomeReader, seconds: dict[str, float]
) -> BootstrapSummary:
    kept: dict[str, int] = {source: 0 for source in config.bootstrap.sources}
    refused: dict[str, dict[str, int]] = {}
    num_quarantined = 0
    for (key, status, reason), count in reader.counts().items():
        source = source_of(key)
        if status == "kept":
            kept[source] = kept.get(source, 0) + count
        elif status == "refused":
            by_reason = refused.setdefault(source, {})
            by_reason[reason] = by_reason.get(reason, 0) + count
        elif status != "scored":
            num_quarantined += count
    return BootstrapSummary(config.data.groups, num_annotations, None, kept, refused, num_quarantined, 0, {}, seconds)
