"""Workers that share a job through leases."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bpo.bootstrap import run as run_module
from bpo.bootstrap.engines import models as engines_module
from bpo.bootstrap.job.leases import Leases
from bpo.bootstrap.job.merge import BootstrapSummary
from bpo.bootstrap.job.outcomes import Outcome, OutcomeReader, OutcomeWriter
from bpo.bootstrap.job.queue import SourceQueue
from bpo.bootstrap.job.spool import AnnotationSpool
from bpo.bootstrap.run import run_bootstrap
from bpo.bootstrap.sources import ImageAnswers
from bpo.config.training import Config
from bpo.formats.files import read_groups
from bpo.job.launch import Ranks
from bpo.job.process import this_process
from bpo.records import Annotation, ContentPart, Turn
from tests.bootstrap.jobs import num_lines, num_outcomes, parts, results

MakeConfig = Callable[..., Config]


def dead_process() -> str:
    """The id of a process that has ended."""
    return subprocess.run(["sh", "-c", "echo $$"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def test_a_piece_has_one_owner_until_it_is_given_back(tmp_path: Path) -> None:
    with Leases(tmp_path, "a", 60) as a, Leases(tmp_path, "b", 60) as b:
        assert a.take("piece") and not b.take("piece") and b.take("other")
        a.release("piece")
        assert b.take("piece") and not a.take("piece")
    with Leases(tmp_path, "a", 60) as a:  # leaving releases everything
        assert a.take("piece") and a.take("other")
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_ask_at_once_one_gets_a_piece(tmp_path: Path) -> None:
    """Also if its owner is dead and all of them detect that at once."""
    for number in range(20):
        (tmp_path / f"{number}.claim").write_text("dead" if number % 2 else "")
        os.utime(tmp_path / f"{number}.claim", (0, 0))
    ready = threading.Barrier(8)

    def ask(worker: int) -> list[int]:
        with Leases(tmp_path, f"w{worker}", 60) as leases:
            ready.wait()
            taken: list[int] = []
            for number in [*range(40), *range(40)]:
                if number not in taken and leases.take(str(number)):
                    taken.append(number)
            ready.wait()
            return taken

    with ThreadPoolExecutor(8) as pool:
        taken = [number for numbers in pool.map(ask, range(8)) for number in numbers]
    assert sorted(taken) == list(range(40))


def test_a_silent_owner_loses_its_piece_and_a_living_one_does_not(tmp_path: Path) -> None:
    with Leases(tmp_path, "living", 1.5) as living:
        assert living.take("piece")
        (tmp_path / "silent.alive").write_text("elsewhere 1")
        (tmp_path / "theirs.claim").write_text("silent")
        with Leases(tmp_path, "other", 1.5) as other:
            assert not other.take("theirs")
            while not other.take("theirs"):
                time.sleep(0.1)
            assert not other.take("piece")


def test_who_comes_back_under_its_name_has_its_pieces_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.alive").write_text("elsewhere 1")
    (tmp_path / "piece.claim").write_text("a")
    with Leases(tmp_path, "a", 60) as a:
        assert a.take("piece")


def test_a_sign_of_life_tells_a_recycled_process_id(tmp_path: Path) -> None:
    """The id is that of a running process with another start time: the owner is gone."""
    here = this_process()
    signs = {
        "recycled": f"{here.boot} {here.pid} 1 {here.host}",
        "running": f"{here.boot} {here.pid} {here.started} {here.host}",
        "other-host": f"{here.boot} {here.pid} 1 elsewhere",  # containers of one machine share its boot id
        "earlier-version": f"{here.boot} {here.pid}",
        "earlier-version-dead": f"{here.boot} {dead_process()}",
    }
    for name, sign in signs.items():
        (tmp_path / f"{name}.alive").write_text(sign)
        (tmp_path / f"{name}.claim").write_text(name)
    with Leases(tmp_path, "a", 60) as a:
        assert (tmp_path / "a.alive").read_text() == signs["running"]
        assert [name for name in signs if a.take(name)] == ["recycled", "earlier-version-dead"]


def source_work(folder: Path, num_records: int, size: int, monkeypatch: pytest.MonkeyPatch, pieces: int) -> SourceQueue:
    monkeypatch.setattr("bpo.bootstrap.job.queue.MAX_PIECES", pieces)
    turn = (Turn("user", (ContentPart("text", "?"),)),)
    spool = AnnotationSpool((Annotation(f"r{n}", (), turn, "x") for n in range(num_records)), 0, 350)
    (reader := OutcomeReader(folder)).poll()
    return SourceQueue("inject", spool.batches(size, 0), reader)


def test_pieces_cover_the_work_once_and_end_where_their_last_batch_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = source_work(tmp_path, 53, 5, monkeypatch, pieces=4)
    with Leases(tmp_path / "claims", "a", 60) as a, Leases(tmp_path / "claims", "b", 60) as b:
        assert b.take(work._name(1))  # batches 3, 4 and 5
        got = list(work.leased(a))
    assert [batch.number for batch in got] == [0, 1, 2, 6, 7, 8, 9, 10]
    assert [batch.number for batch in got if batch.ends] == [2, 8, 10]
    assert not work.is_finished()
    late = work.batches[1][2].id
    done = [Outcome(f"r{n}", "inject", "kept") for n in range(53) if f"r{n}" != late]
    with OutcomeWriter(tmp_path, 0) as writer:
        writer.append(done)
    work._reader.poll()
    assert not work.is_finished() and work.missing() == (1, late) and work.num_done() == 52
    again = source_work(tmp_path, 53, 5, monkeypatch, pieces=4)
    with Leases(tmp_path / "claims", "a", 60) as a:
        assert [batch.number for batch in again.leased(a)] == [1]


@contextmanager
def ranks_in_threads(monkeypatch: pytest.MonkeyPatch, world_size: int) -> Iterator[Callable[[int, Config], Future]]:
    """Starts a job as one of its ranks, each in a thread of its own."""
    here = threading.local()
    # transformers changes global state while it loads a model: load one after the other, as in processes.
    loading = threading.Lock()

    def one_at_a_time(load: Callable[..., Any]) -> Callable[..., Any]:
        def locked(*arguments: Any) -> Any:
            with loading:
                return load(*arguments)

        return locked

    monkeypatch.setattr(engines_module, "load_model", one_at_a_time(engines_module.load_model))
    monkeypatch.setattr(engines_module, "load_causal_lm", one_at_a_time(engines_module.load_causal_lm))
    monkeypatch.setattr(run_module, "ranks_from_environment", lambda: Ranks(here.rank, world_size, here.rank))
    monkeypatch.setattr(run_module, "_POLL_S", 0.05)

    def run(rank: int, config: Config) -> BootstrapSummary:
        here.rank = rank
        return run_bootstrap(config, progress=False)

    with ThreadPoolExecutor(world_size) as pool:
        yield lambda rank, config: pool.submit(run, rank, config)


def test_ranks_share_the_work_and_give_the_same_files(make: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    one, three = make("one", batch_size=1), make("three", batch_size=1)
    run_bootstrap(one, progress=False)
    with ranks_in_threads(monkeypatch, 3) as start:
        others = [start(rank, three) for rank in (1, 2)]
        summary = start(0, three).result()
        assert [other.result().num_groups for other in others] == [None, None]
    assert summary.num_groups == len(read_groups(Path(one.data.groups)))
    assert results(three) == results(one)
    assert sum(num_lines(three)) == 18 and len(num_lines(three)) == 3  # none done twice
    assert not list((parts(three) / "claims").iterdir())


def test_rank_0_waits_for_what_others_have_claimed(make: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make("a", sources=["weaken"])
    claimed, go_on = threading.Event(), threading.Event()
    outcomes = ImageAnswers.outcomes

    def slow(self: ImageAnswers, batch: Any, prepared: Any) -> Any:
        if not claimed.is_set():
            claimed.set()
            go_on.wait(60)
        return outcomes(self, batch, prepared)

    monkeypatch.setattr(ImageAnswers, "outcomes", slow)
    with ranks_in_threads(monkeypatch, 2) as start:
        other = start(1, config)
        assert claimed.wait(60)
        first = start(0, config)
        with pytest.raises(TimeoutError):
            first.result(timeout=3)  # its own share is finished by now
        go_on.set()
        summary = first.result()
        other.result()
    assert summary.kept["weaken"] + sum(summary.refused.get("weaken", {}).values()) == 9
    assert sum(num_lines(config)) == 9


def test_rank_0_gives_up_when_a_living_rank_does_nothing(make: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make("a", sources=["weaken"], stall_timeout_s=0.2)
    monkeypatch.setattr(run_module, "ranks_from_environment", lambda: Ranks(0, 2, 0))
    with Leases(parts(config) / "claims", "worker-00001", 120) as other:
        assert other.take("weaken-4x1-000000")
        with pytest.raises(TimeoutError, match="4 of 9 outcomes are missing.*stall_timeout_s"):
            run_bootstrap(config, progress=False)
    run_bootstrap(config, progress=False)  # the other has left


def test_the_stall_timeout_starts_with_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that worked for hours has not waited for hours, and each outcome of others restarts the timeout."""
    now_s = 10_000.0
    monkeypatch.setattr(run_module.time, "monotonic", lambda: now_s)
    monkeypatch.setattr(run_module.time, "sleep", lambda seconds: None)
    work = source_work(tmp_path, 9, 3, monkeypatch, pieces=9)
    reader, stall = work._reader, run_module.StallTimeout(100.0)
    now_s = 20_000.0
    stall.wait(reader, {"inject": work}, None)
    now_s += 99
    stall.wait(reader, {"inject": work}, None)
    with OutcomeWriter(tmp_path, 1) as writer:
        writer.append([Outcome("r3", "inject", "kept")])
    reader.poll()
    now_s += 99
    stall.wait(reader, {"inject": work}, None)
    now_s += 101
    with pytest.raises(TimeoutError, match="8 of 9 outcomes are missing"):
        stall.wait(reader, {"inject": work}, None)


def test_a_dead_ranks_work_is_done_by_the_others(make: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once if its process on this machine has ended; after the timeout if it ran on another machine."""
    monkeypatch.setattr(run_module, "_POLL_S", 0.05)
    config = make("a", sources=["weaken"], claim_timeout_s=1.0)
    claims = parts(config) / "claims"
    claims.mkdir(parents=True)
    (claims / "worker-00001.alive").write_text(f"{this_process().boot} {dead_process()}")
    (claims / "worker-00002.alive").write_text(f"another-machine {os.getpid()}")
    (claims / "weaken-4x1-000000.claim").write_text("worker-00001")
    (claims / "weaken-4x1-000001.claim").write_text("worker-00002")
    started = time.monotonic()
    run_bootstrap(config, progress=False)
    assert time.monotonic() - started >= 1.0
    assert num_outcomes(config) == 9
