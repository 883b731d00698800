"""Annotations and outcomes on disk."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpo.bootstrap.job.merge import merge
from bpo.bootstrap.job.outcomes import Outcome, OutcomeReader, OutcomeWriter, record_digest
from bpo.bootstrap.job.queue import SourceQueue
from bpo.bootstrap.job.spool import AnnotationSpool, Batches
from bpo.config.bootstrap import BootstrapConfig
from bpo.config.training import Config, DataConfig
from bpo.formats.bad_records import BadRecords
from bpo.records import Annotation, ContentPart, Provenance, Turn

PROMPT = (Turn("user", (ContentPart("image"), ContentPart("text", "Describe."))),)


def annotation(number: int, words: int = 3) -> Annotation:
    return Annotation(f"r{number}\udc80", (f"{number}.png",), PROMPT, f"{number} " + "dog " * words)


def spool(*words: int, limit: int = 0) -> AnnotationSpool:
    return AnnotationSpool((annotation(n, w) for n, w in enumerate(words)), limit, max_words=350)


def test_annotations_come_back_in_order_and_by_position() -> None:
    spooled = spool(3, 1, 2)
    assert list(spooled) == list(spooled) == [annotation(0, 3), annotation(1, 1), annotation(2, 2)]
    assert spooled[1] == annotation(1, 1) and len(spooled) == 3 and spooled.most_images == 1
    assert spooled.digest(2) == record_digest(annotation(2).id)
    assert len(spool(3, 1, 2, limit=2)) == 2


def ids(batches: Batches) -> list[list[str]]:
    return [[annotation.id for annotation in batches[number]] for number in range(len(batches))]


def test_work_leaves_out_what_is_refused_and_does_not_depend_on_the_order_of_the_file() -> None:
    words = [3, 400, *range(5, 95)]
    forwards = spool(*words)
    planned = ids(forwards.batches(4, seed=0))
    usable = {annotation(n, w).id for n, w in enumerate(words) if w < 350}
    assert sorted(sum(planned, [])) == sorted(usable)
    assert planned[0][0] == annotation(91, 94).id  # the longest
    backwards = AnnotationSpool(reversed(list(forwards)), 0, 350)
    assert ids(backwards.batches(4, seed=0)) == planned != ids(forwards.batches(4, seed=1))
    assert sorted(sum(ids(forwards.batches(4, 0, limit=3)), [])) == sorted(annotation(n).id for n in (0, 2))
    assert (
        len(forwards.batches(4, 0, limit=1)) == 1 and ids(spool(400).batches(4, 0)) == ids(spool().batches(4, 0)) == []
    )


def test_batches_are_read_when_asked_for() -> None:
    batches = (spooled := spool(*range(20, 9, -1))).batches(3, seed=0)
    assert sorted(len(batches[i]) for i in range(len(batches))) == [2, 3, 3, 3]
    assert batches.num_records == 11 and {a for i in range(4) for a in batches[i]} == set(spooled)
    assert batches.digests(3) == [record_digest(a.id) for a in batches[3]]


def outcomes(count: int, source: str = "weaken") -> Iterator[Outcome]:
    return (Outcome(annotation(n).id, source, "kept", f"{n} zebras", provenance=Provenance("x")) for n in range(count))


def test_outcomes_are_read_from_their_position(tmp_path: Path) -> None:
    with OutcomeWriter(tmp_path, 0) as writer:
        writer.append(outcomes(5))
    reader = OutcomeReader(tmp_path)
    assert reader.poll() == len(reader) == 5 and reader.poll() == 0
    with OutcomeWriter(tmp_path, 1) as writer:
        writer.append([*outcomes(7), Outcome("bad", "inject", "broken", reason="no picture")])
    assert reader.poll() == 3  # five were known
    assert ("weaken", annotation(6).id) in reader and ("inject", annotation(6).id) not in reader
    found = reader.get(("weaken", annotation(6).id))
    assert found is not None and found.text == "6 zebras" and reader.get(("weaken", "unknown")) is None
    assert reader.broken() == [record_digest("bad")]
    assert reader.counts() == {("weaken", "kept", ""): 7, ("inject", "broken", ""): 1}


def test_a_line_that_is_still_being_written_is_read_when_it_is_whole(tmp_path: Path) -> None:
    whole = b"".join(outcome.to_line() for outcome in outcomes(2))
    part = tmp_path / "rank-00000.jsonl"
    part.write_bytes(whole[:-10])
    reader = OutcomeReader(tmp_path)
    assert reader.poll() == 1
    part.write_bytes(whole)
    assert reader.poll() == 1 and reader.get(("weaken", annotation(1).id)) is not None


@pytest.mark.parametrize("tail", [b"{", b"x" * 200_000])
def test_a_torn_last_line_is_dropped_whatever_its_length(tmp_path: Path, tail: bytes) -> None:
    whole = b"".join(outcome.to_line() for outcome in outcomes(2))
    (tmp_path / "rank-00000.jsonl").write_bytes(whole + tail)
    with OutcomeWriter(tmp_path, 0):
        pass
    assert (tmp_path / "rank-00000.jsonl").read_bytes() == whole


def peak_bytes(folder: Path, count: int) -> int:
    """Most Python memory while `count` records are read, planned, indexed and merged."""
    folder.mkdir()
    with OutcomeWriter(folder / "parts", 0) as writer:
        writer.append(outcomes(count))
    config = Config(data=DataConfig(groups=str(folder / "groups.jsonl")), bootstrap=BootstrapConfig(sources=["weaken"]))
    config.measure.quick_pairs = 100  # measures keep a sample of texts
    tracemalloc.start()
    spooled = AnnotationSpool((annotation(n, 30) for n in range(count)), 0, 350)
    reader = OutcomeReader(folder / "parts")
    reader.poll()
    assert SourceQueue("weaken", spooled.batches(16, 0), reader).is_finished()
    summary = merge(config, spooled, reader, {}, {}, BadRecords())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert summary.num_groups == count
    return peak


def test_memory_hardly_grows_with_the_records(tmp_path: Path) -> None:
    peak_bytes(tmp_path / "warm", 10)
    small, large = peak_bytes(tmp_path / "small", 200), peak_bytes(tmp_path / "large", 4000)
    assert (large - small) / 3800 < 120, (small, large)  # bytes per record: positions, lengths, digests, order
