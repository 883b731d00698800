"""Jobs of `bpo rank`: shared by processes, interrupted, with groups that cannot be judged."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from bpo.bootstrap.job.leases import Leases
from bpo.config.training import Config
from bpo.formats.bad_records import TooManyBadRecords
from bpo.job.exits import Interrupted, JobError
from bpo.job.signals import StopRequest
from bpo.ranking.judge import JUDGES, Failed, Scored
from bpo.ranking.judgements import read_judgements
from bpo.ranking.run import RankSummary, run_rank
from bpo.records import PreferenceGroup
from tests.ranking.candidates import CountingJudge, by_length, config_of, groups, register, write_groups

Make = Callable[..., CountingJudge]


@pytest.fixture
def make() -> Make:
    """Registers a `CountingJudge` as the judge `counting`."""

    def made(answer: Callable[[PreferenceGroup], Scored | Failed] = by_length, version: int = 1) -> CountingJudge:
        judge = CountingJudge(answer, version)
        register("counting", judge)
        return judge

    yield made
    JUDGES.pop("counting", None)


def rank(config: Config, stop: StopRequest | None = None) -> RankSummary:
    return run_rank(config, stop, progress=False)


def shard(config: Config, index: int) -> Config:
    return replace(config, rank=replace(config.rank, num_shards=2, shard_index=index))


def test_all_groups_go_through_a_pass_before_the_next_begins(tmp_path: Path, make: Make) -> None:
    judge, records = make(), groups(5)
    config = config_of(write_groups(tmp_path / "c.jsonl", records), "counting", batch_size=2)
    summary = rank(config)
    assert [name for name, _ in judge.asked] == ["long"] * 5 + ["short"] * 5
    found = read_judgements(tmp_path / "c.jsonl.judgements")
    for record in records:
        judgement = found.of(record)
        assert judgement.scored.scores == tuple(0.75 * len(c.response) for c in record.completions)
        assert judgement.judge["name"] == "counting" and len(judgement.judge["identity"]) == 12
    written = json.loads((found.folder / "summary.json").read_text())
    assert (written["num_groups"], written["num_judged"], written["failed"]) == (5, 5, {}) and summary.is_finished
    assert written["identity"] == {"judge": "counting", "version": 1} and list(written["seconds"]) == ["long", "short"]
    assert not list((found.folder / "claims").iterdir())


def test_two_jobs_share_the_groups_and_judge_none_twice(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bpo.ranking.run._POLL_S", 0.02)
    both_work = threading.Barrier(2, timeout=20)
    seen: set[int] = set()

    def answer(record: PreferenceGroup) -> Scored | Failed:
        if threading.get_ident() not in seen:  # each has claimed a batch before one goes on
            seen.add(threading.get_ident())
            both_work.wait()
        time.sleep(0.02 if threading.current_thread().name == "slow" else 0.001)
        return by_length(record)

    judge = make(answer)
    config = config_of(write_groups(tmp_path / "c.jsonl", groups(24)), "counting", batch_size=3)
    names = enumerate(("slow", "fast"))
    jobs = [threading.Thread(target=rank, args=(shard(config, index),), name=name) for index, name in names]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert Counter(judge.asked) == Counter((name, f"g{n}") for name in judge.passes for n in range(24))
    passes = [name for name, _ in judge.asked]
    assert passes == sorted(passes)  # the fast one waits before the second pass
    folder = tmp_path / "c.jsonl.judgements"
    own = [len(path.read_text().splitlines()) for path in sorted(folder.glob("rank-*.jsonl"))]
    assert len(own) == 2 and sum(own) == 48 and min(own) >= 3
    assert json.loads((folder / "summary.json").read_text())["num_judged"] == 24


def test_a_batch_that_another_job_finished_in_the_meantime_is_not_judged_again(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, take, others = make(), Leases.take, []
    config = config_of(write_groups(tmp_path / "c.jsonl", groups(4)), "counting", batch_size=2)

    def take_late(self: Leases, piece: str) -> bool:
        if not others:  # the whole work of another job, after this one has found the batch unfinished
            others.append(piece)
            rank(shard(config, 1))
        return take(self, piece)

    monkeypatch.setattr(Leases, "take", take_late)
    assert rank(config).is_finished and len(judge.asked) == 8


def test_a_killed_job_goes_on_where_it_was(tmp_path: Path, make: Make) -> None:
    def dies_at_g4(record: PreferenceGroup) -> Scored | Failed:
        if record.id == "g4":
            raise KeyboardInterrupt
        return by_length(record)

    config = config_of(write_groups(tmp_path / "c.jsonl", groups(9)), "counting", batch_size=3)
    first = make(dies_at_g4)
    with pytest.raises(KeyboardInterrupt):
        rank(config)
    assert not (tmp_path / "c.jsonl.judgements" / "summary.json").exists()
    with (tmp_path / "c.jsonl.judgements" / "rank-00000.jsonl").open("a") as journal:
        journal.write('{"id": "g8", "digest": "0')  # torn by the kill
    second = make()
    assert rank(config).num_judged == 9
    # The judge goes through a batch from its end: g5 came before the error, and is kept.
    assert [group_id for name, group_id in second.asked if name == "long"] == ["g4", "g3", "g8", "g7", "g6"]
    assert ("long", "g5") in first.asked
    third = make()
    assert rank(config).is_finished and not third.asked


def test_a_signal_ends_the_job_after_a_batch(tmp_path: Path, make: Make) -> None:
    class Stop:
        def check(self, what: str) -> None:
            if judge.asked:
                raise Interrupted(what)

    judge = make()
    config = config_of(write_groups(tmp_path / "c.jsonl", groups(6)), "counting", batch_size=2)
    with pytest.raises(Interrupted, match="every finished batch is kept"):
        rank(config, Stop())  # type: ignore[arg-type]
    assert len(judge.asked) == 2
    assert rank(config).is_finished and len(judge.asked) == 12


def test_a_judge_that_fails_because_of_the_same_signal_is_an_interruption(tmp_path: Path, make: Make) -> None:
    stop = SimpleNamespace(received=False)
    stop.check = lambda what: StopRequest.check(stop, what)

    def killed(record: PreferenceGroup) -> Scored | Failed:
        stop.received = True
        raise JobError("the judge's program ended with -15")

    make(killed)
    config = config_of(write_groups(tmp_path / "c.jsonl", groups(2)), "counting")
    with pytest.raises(Interrupted):
        rank(config, stop)  # type: ignore[arg-type]


def test_a_group_that_fails_is_quarantined_and_not_judged_by_later_passes(tmp_path: Path, make: Make) -> None:
    def answer(record: PreferenceGroup) -> Scored | Failed:
        wrong = {"g1": Failed("no image: x.png"), "g2": Scored((1.0, float("nan"))), "g3": Scored((1.0,))}
        return wrong.get(record.id) or by_length(record)

    judge = make(answer)
    config = config_of(write_groups(tmp_path / "c.jsonl", groups(20)), "counting", data={"max_bad_share": 0.2})
    assert rank(config).failed == {"no image": 1, "a score that is no number": 1, "wrong number of scores": 1}
    assert not {("short", "g1"), ("short", "g2"), ("short", "g3")} & {*judge.asked}
    folder = tmp_path / "c.jsonl.judgements"
    listed = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["record"] for entry in listed] == ["g1", "g2", "g3"] and listed[0]["error"] == "no image: x.png"
    assert read_judgements(folder).of(groups(2)[1]) == Failed("no image: x.png")


def test_too_many_failures_end_the_job_without_a_summary(tmp_path: Path, make: Make) -> None:
    make(lambda record: Failed("mute: again") if record.id < "g3" else by_length(record))
    config = config_of(write_groups(tmp_path / "c.jsonl", groups(9)), "counting")
    with pytest.raises(TooManyBadRecords, match=r"3 of 9 records are bad.*quarantine.jsonl lists them.*'mute': 3"):
        rank(config)
    assert not (tmp_path / "c.jsonl.judgements" / "summary.json").exists()


def test_on_bad_error_stops_at_the_first_failure_which_is_tried_again(tmp_path: Path, make: Make) -> None:
    make(lambda record: Failed("mute") if record.id == "g1" else by_length(record))
    config = config_of(write_groups(tmp_path / "c.jsonl", groups(3)), "counting", data={"on_bad": "error"})
    with pytest.raises(ValueError, match="group 'g1' cannot be judged: mute"):
        rank(config)
    judge = make()
    assert rank(config).num_judged == 3
    assert ("long", "g2") not in judge.asked  # judged before the failure


def test_a_judge_that_forgets_a_group_has_failed_it(tmp_path: Path, make: Make) -> None:
    judge = make()
    judge.judge = lambda name, records: iter(())  # type: ignore[method-assign]
    config = config_of(write_groups(tmp_path / "c.jsonl", groups(2)), "counting", data={"max_bad_share": 1.0})
    assert rank(config).failed == {"no result of the judge": 2}


def test_a_job_waits_for_the_batches_of_others_but_not_for_ever(tmp_path: Path, make: Make) -> None:
    config = config_of(write_groups(tmp_path / "c.jsonl", groups(4)), "counting", batch_size=2, stall_timeout_s=0.1)
    held = threading.Event()
    leave = threading.Event()

    def answer(record: PreferenceGroup) -> Scored | Failed:
        held.set()
        leave.wait(20)
        return by_length(record)

    make(answer)
    other = threading.Thread(target=rank, args=(shard(config, 1),))
    other.start()
    held.wait(20)
    make()
    with pytest.raises(TimeoutError, match=r"2 groups have no result of `long`.*rank.stall_timeout_s"):
        rank(config)
    leave.set()
    other.join()
    assert rank(config).num_judged == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"judge": ""}, "rank.judge is ''; known are chair, claims, command"),
        ({"candidates": ""}, "rank.candidates must be set"),
        ({"judge": "chiar"}, "rank.judge is 'chiar'; did you mean `chair`"),
        ({"options": {"detection": "x"}}, "unknown option `detection` of the judge chair; did you mean `detections`"),
    ],
)
def test_a_mistake_in_the_options_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    config = config_of(write_groups(tmp_path / "c.jsonl", groups(2)), "chair")
    with pytest.raises(ValueError, match=message):
        rank(replace(config, rank=replace(config.rank, **change)))


def test_a_plugin_registers_a_judge_and_is_part_of_its_identity(tmp_path: Path) -> None:
    source = """
from bpo.ranking.judge import Judge, Scored, register_judge

@register_judge("by_count")
class ByCount(Judge):
    def __init__(self, config, ranks):
        pass

    def identity(self):
        return {}

    def judge(self, name, groups):
        for index, group in enumerate(groups):
            yield index, Scored(tuple(float(c.response.count("a")) for c in group.completions))
"""
    (tmp_path / "own.py").write_text(source)
    config = config_of(write_groups(tmp_path / "c.jsonl", groups(1)), "by_count", plugin=str(tmp_path / "own.py"))
    try:
        assert set(rank(config).identity) == {"judge", "plugin (SHA-256)"}
    finally:
        JUDGES.pop("by_count", None)
    assert read_judgements(tmp_path / "c.jsonl.judgements").of(groups(1)[0]).scored.scores == (2.0, 3.0)
