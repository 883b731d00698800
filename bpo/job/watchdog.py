"""A rank that dies, freezes or hangs takes the job down in bounded time, with one line that names it.

OUTPUT/heartbeats/rank-00003.json    host, process, beats of a thread, and how far the main thread has come

Every rank has a thread that rewrites its own file and reads its neighbour's (rank + 1), so that the work does not grow
with the number of ranks. Two things are noticed:

    silence     the neighbour's file stands still: its process is dead, stopped or swapped out, or its host is gone
    no progress the own main thread stands still (most often: it waits in a collective for someone): all files are read
                twice, and the silent rank, else the one that is furthest behind, is the culprit

The thread ends the process by os._exit, because the main thread may never return from a collective. Ages are measured
by the reader's monotonic clock from the last change it saw: clocks of hosts are never compared.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from bpo.job.durable import write_durably
from bpo.job.exits import EXIT_RANK_LOST
from bpo.job.process import ProcessIdentity, is_running, this_process

logger = logging.getLogger(__name__)

MAX_INTERVAL_S = 5.0


@dataclass
class Heartbeat:
    """What a rank tells of itself. `position` grows with every forward pass; `beats` with every second or so.

    `run` is the same on all ranks of one start: files of an earlier one speak for nobody.
    """

    run: str
    rank: int
    host: str
    boot: str
    pid: int
    started: str | None
    beats: int = 0
    position: int = 0
    step: int = 0
    doing: str = "starting"
    ended: bool = False
    failure: str = ""

    def where(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid})"

    def progress(self) -> str:
        return f"last finished step {self.step}, then {self.doing}"


def heartbeat_path(output_dir: Path, rank: int) -> Path:
    return output_dir / "heartbeats" / f"rank-{rank:05d}.json"


def read_heartbeat(path: Path, run: str) -> Heartbeat | None:
    """A rank's newest heartbeat of this run; None where there is none, or none can be read: both are silence.

    Files are replaced as a whole, so there is never half a one; NFS may say that the one just opened is stale.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return None
    return Heartbeat(**tree) if tree.get("run") == run else None


def is_dead(heartbeat: Heartbeat) -> bool:
    """Whether its process is known to be gone; of another host that cannot be known."""
    process = ProcessIdentity(heartbeat.host, heartbeat.boot, heartbeat.pid, heartbeat.started)
    return not heartbeat.ended and is_running(process) is False


class Watchdog:
    """One rank's heartbeat and its eye on the others; `stop` when the run is over.

    Args:
        timeout_s: Silence or lack of progress for so long ends the job; 0 watches nothing.
        run: Anything that all ranks of this start share, and no other start.
        end: Called with an exit code; for tests.
    """

    def __init__(
        self,
        output_dir: Path,
        rank: int,
        world_size: int,
        timeout_s: float,
        run: str = "",
        end: Callable[[int], None] = os._exit,
    ):
        self.output_dir, self.world_size, self.timeout_s, self._end = output_dir, world_size, timeout_s, end
        self.interval_s = min(MAX_INTERVAL_S, timeout_s / 10)
        self.own = Heartbeat(run, rank, *this_process())
        self.moving = True  # False: nothing is expected of the main thread, as in `unbounded`
        self._unbounded = 0
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if timeout_s:
            heartbeat_path(output_dir, rank).parent.mkdir(parents=True, exist_ok=True)
            self._publish()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def beat(self, doing: str, step: int | None = None) -> None:
        """The main thread has come further; costs nothing, the thread publishes it."""
        self.own.doing = doing
        self.own.step = self.own.step if step is None else step
        self.own.position += 1

    @contextlib.contextmanager
    def unbounded(self, doing: str) -> Iterator[None]:
        """A phase without beats and of any length; the death or silence of a rank is still noticed."""
        self.beat(doing)
        self._unbounded += 1
        try:
            yield
        finally:
            self._unbounded -= 1
            self.beat(f"after {doing}")

    def stop(self, failure: str = "") -> None:
        """The run is over on this rank, as it should be or by `failure`."""
        if self._thread is None:
            return
        self._stopped.set()
        self._thread.join()
        self.own.ended, self.own.failure = True, failure
        self._publish()

    def _publish(self) -> None:
        self.own.beats += 1
        path = heartbeat_path(self.output_dir, self.own.rank)
        try:
            write_durably(path, json.dumps(asdict(self.own)), sync=False)
        except OSError as error:  # a full disk: the others will say so if it lasts
            logger.warning("%s cannot be written: %s", path, error)

    def _watch(self) -> None:
        neighbour = (self.own.rank + 1) % self.world_size
        seen, seen_at = -1, time.monotonic()
        position, moved_at = -1, time.monotonic()
        while not self._stopped.wait(self.interval_s):
            self._publish()
            now = time.monotonic()
            if self.own.position != position or self._unbounded or not self.moving:
                position, moved_at = self.own.position, now
            if now - moved_at > self.timeout_s:
                return self._fire(self._verdict(f"rank {self.own.rank} has not moved for {now - moved_at:.0f} s"))
            if neighbour == self.own.rank:
                continue
            other = self._read(neighbour)
            if other is None:
                if now - seen_at > self.timeout_s:
                    return self._fire(f"rank {neighbour} has not been heard of for {now - seen_at:.0f} s")
            elif other.ended or other.beats != seen:
                seen, seen_at = other.beats, now
            elif is_dead(other):
                return self._fire(f"{other.where()} died; {other.progress()}")
            elif now - seen_at > self.timeout_s:
                return self._fire(f"{other.where()} gave no sign for {now - seen_at:.0f} s; {other.progress()}")
        return None

    def _read(self, rank: int) -> Heartbeat | None:
        return read_heartbeat(heartbeat_path(self.output_dir, rank), self.own.run)

    def _everyone(self) -> list[Heartbeat]:
        return [one for one in map(self._read, range(self.world_size)) if one is not None]

    def culprit(self) -> str | None:
        """The rank that failed, is dead or silent, by name; takes a few intervals. None if all are alive."""
        before = {one.rank: one.beats for one in self._everyone()}
        for _ in range(4):
            for one in self._everyone():
                if one.failure:
                    return f"{one.where()} failed ({one.failure}); {one.progress()}"
                if is_dead(one):
                    return f"{one.where()} died; {one.progress()}"
            time.sleep(self.interval_s)
            self._publish()
        for one in self._everyone():
            if before.get(one.rank) == one.beats and not one.ended and one.rank != self.own.rank:
                return f"{one.where()} is silent; {one.progress()}"
        return None

    def _verdict(self, what: str) -> str:
        silent = self.culprit()
        if silent is not None:
            return silent
        last = min(self._everyone(), key=lambda one: one.position)
        behind = [one for one in self._everyone() if one.position == last.position]
        if len(behind) == self.world_size > 1:
            return (
                f"{what}, nor has any other: all wait at one place (network, or a collective that differs between "
                f"ranks); {last.progress()}"
            )
        return f"{what}; {last.where()} is furthest behind: {last.progress()}"

    def _fire(self, message: str) -> None:
        # Written at once and whole: this process ends now, and every rank may be writing.
        advice = f"Continue with --resume (exit code {EXIT_RANK_LOST})"
        os.write(sys.stderr.fileno(), f"[rank {self.own.rank}] the job ends here: {message}. {advice}\n".encode())
        self._end(EXIT_RANK_LOST)
