"""Sources of one job take turns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from bpo.bootstrap.engines.prefetch import Prefetcher
from bpo.bootstrap.job.broken_images import BrokenImages
from bpo.bootstrap.job.leases import Leases
from bpo.bootstrap.job.outcomes import Outcome, OutcomeReader, OutcomeWriter
from bpo.bootstrap.job.queue import SourceQueue
from bpo.bootstrap.job.spool import AnnotationSpool
from bpo.bootstrap.job.worker import Results, Worker
from bpo.config.training import DataConfig
from bpo.formats.bad_records import BadRecords
from bpo.job.exits import Interrupted
from bpo.job.signals import StopRequest
from bpo.records import Annotation, ContentPart, Turn
from tests.bootstrap.jobs import stop_after

TURN = (Turn("user", (ContentPart("text", "?"),)),)


class Echo:
    """A source that keeps every annotation."""

    whole_batches = True

    def __init__(self, source: str):
        self.source = source

    def prepare(self, annotation: Annotation) -> None:
        return None

    def outcomes(self, batch: Sequence[Annotation], prepared: Sequence[None]) -> Iterator[Outcome]:
        return (Outcome(annotation.id, self.source, "kept", "text") for annotation in batch)


def run(folder: Path, sizes: dict[str, int], stop: StopRequest | None = None, limit: int = 0) -> OutcomeReader:
    """Works on 60 records per source, in batches of the sizes given, to the end or a stop request."""
    spool = AnnotationSpool((Annotation(f"r{n}", (), TURN, "word " * (n % 9 + 1)) for n in range(60)), 0, 350)
    (reader := OutcomeReader(folder)).poll()
    queues = {s: SourceQueue(s, spool.batches(size, 0, limit=limit * (s == "b")), reader) for s, size in sizes.items()}
    make: dict[str, Callable[[], Echo]] = {source: lambda source=source: Echo(source) for source in sizes}
    broken = BrokenImages(DataConfig(), 60, BadRecords(), folder)
    with OutcomeWriter(folder, 0) as writer, Leases(folder / "claims", "w", 60) as leases, Prefetcher(1) as prefetcher:
        worker = Worker(Results(reader, writer, broken), leases, prefetcher, stop, progress=False)
        seconds = worker.run_sources(make, queues)
        assert set(seconds) <= set(sizes) and all(spent > 0 for spent in seconds.values())
    return reader


def stopped(folder: Path, sizes: dict[str, int], batches: int, monkeypatch: pytest.MonkeyPatch, limit: int = 0) -> str:
    with monkeypatch.context() as patch, StopRequest() as stop, pytest.raises(Interrupted) as reason:
        stop_after(patch, batches, stop)
        run(folder, sizes, stop, limit)
    return str(reason.value)


def done(folder: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for line in (folder / "rank-00000.jsonl").read_bytes().splitlines():
        outcome = Outcome.from_json(json.loads(line))
        found.setdefault(outcome.source, set()).add(outcome.record_id)
    return found


def test_a_stop_leaves_the_same_records_finished_for_all_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = stopped(tmp_path, {"a": 4, "b": 4}, 10, monkeypatch)
    assert "20 of 60 records of source `a`, 20 of 60 records of source `b` are done and kept" in message
    finished = done(tmp_path)
    assert finished["a"] == finished["b"] and len(finished["a"]) == 20
    run(tmp_path, {"a": 4, "b": 4})
    assert {source: len(records) for source, records in done(tmp_path).items()} == {"a": 60, "b": 60}


def test_sources_of_unequal_size_are_equally_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(tmp_path, {"a": 2, "b": 10}, 18, monkeypatch)  # 30 and 6 batches
    assert {source: len(records) for source, records in done(tmp_path).items()} == {"a": 30, "b": 30}
    stopped(tmp_path / "limit", {"a": 4, "b": 4}, 10, monkeypatch, limit=20)  # 15 and 5 batches
    assert {source: len(records) for source, records in done(tmp_path / "limit").items()} == {"a": 28, "b": 12}


def test_a_source_that_is_behind_catches_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(tmp_path, {"a": 4}, 8, monkeypatch)
    stopped(tmp_path, {"a": 4, "b": 4}, 10, monkeypatch)
    finished = done(tmp_path)
    assert finished["a"] == finished["b"] and len(finished["b"]) == 36
