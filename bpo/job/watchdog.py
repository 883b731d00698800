"""Ends a job in bounded time if a rank dies, freezes or hangs, with one line that names the rank.

OUTPUT/heartbeats/rank-00003.json    host, process, heartbeat count of a thread, progress of the main thread

Every rank has a thread that rewrites its own file and reads its neighbour's (rank + 1), so the cost does not grow with
the number of ranks. It detects two conditions:

    silence     the neighbour's file does not change: its process is dead, stopped or swapped out, or its host is down
    no progress this rank's main thread does not advance (usually blocked in a collective): all files are read twice;
                the rank at fault is the silent one, else the one furthest behind

The thread ends the process with os._exit, because the main thread may never return from a collective. Ages are measured
with the reader's monotonic clock since the last observed change; clocks of different hosts are never compared.
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
from bpo.job.exits import EXIT_RANK_LOST, write_lost_status
from bpo.job.process import ProcessIdentity, is_running, this_process

logger = logging.getLogger(__name__)

MAX_INTERVAL_S = 5.0
_STATUS_S = 5.0


@dataclass
class Heartbeat:
    """Published state of a rank. `position` grows with every forward pass, `beats` about every second.

    `run` is the same on all ranks of one start; heartbeats left by earlier starts are ignored.
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
    """A rank's latest heartbeat of this run; None if there is none or it cannot be read: both count as silence.

    Files are replaced as a whole, so they are never partial; on NFS, opening one may fail with a stale handle.
    """
    try:
        heartbeat = Heartbeat(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return heartbeat if heartbeat.run == run else None


def is_dead(heartbeat: Heartbeat) -> bool:
    """Whether its process is known to have ended; unknown for processes of other hosts."""
    process = ProcessIdentity(heartbeat.host, heartbeat.boot, heartbeat.pid, heartbeat.started)
    return not heartbeat.ended and is_running(process) is False


class Watchdog:
    """Publishes this rank's heartbeat and monitors the other ranks until `stop`.

    Args:
        timeout_s: Silence or lack of progress for this long ends the job; 0 disables the watchdog.
        run: An id shared by all ranks of this start and by no other start.
        end: Called with the exit code; replaced in tests.
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
        self.moving = True  # False: the main thread has no deadline, as in `unbounded`
        self._unbounded = 0
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if timeout_s:
            heartbeat_path(output_dir, rank).parent.mkdir(parents=True, exist_ok=True)
            self._publish()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def beat(self, doing: str, step: int | None = None) -> None:
        """Records progress of the main thread; free of I/O, since the thread publishes it."""
        self.own.doing = doing
        self.own.step = self.own.step if step is None else step
        self.own.position += 1

    @contextlib.contextmanager
    def unbounded(self, doing: str) -> Iterator[None]:
        """A phase of any length without beats; the death or silence of a rank is still detected."""
        self.beat(doing)
        self._unbounded += 1
        try:
            yield
        finally:
            self._unbounded -= 1
            self.beat(f"after {doing}")

    def stop(self, failure: str = "") -> None:
        """Ends monitoring on this rank, after success or `failure`."""
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
        except OSError as error:  # such as a full disk: if it persists, the other ranks report silence
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
                return self._fire(self.verdict(f"rank {self.own.rank} made no progress for {now - moved_at:.0f} s"))
            if neighbour == self.own.rank:
                continue
            other = self._read(neighbour)
            if other is None:
                if now - seen_at > self.timeout_s:
                    return self._fire(f"rank {neighbour} has published no heartbeat for {now - seen_at:.0f} s")
            elif other.ended or other.beats != seen:
                seen, seen_at = other.beats, now
            elif is_dead(other):
                return self._fire(f"{other.where()} died; {other.progress()}")
            elif now - seen_at > self.timeout_s:
                return self._fire(f"{other.where()} sent no heartbeat for {now - seen_at:.0f} s; {other.progress()}")
        return None

    def _read(self, rank: int) -> Heartbeat | None:
        return read_heartbeat(heartbeat_path(self.output_dir, rank), self.own.run)

    def _heartbeats(self) -> list[Heartbeat]:
        return [heartbeat for heartbeat in map(self._read, range(self.world_size)) if heartbeat is not None]

    def culprit(self) -> str | None:
        """Names the rank that failed, died or is silent; takes a few intervals. None if all are alive."""
        before = {heartbeat.rank: heartbeat.beats for heartbeat in self._heartbeats()}
        for _ in range(4):
            for heartbeat in self._heartbeats():
                if heartbeat.failure:
                    return f"{heartbeat.where()} failed ({heartbeat.failure}); {heartbeat.progress()}"
                if is_dead(heartbeat):
                    return f"{heartbeat.where()} died; {heartbeat.progress()}"
            time.sleep(self.interval_s)
            self._publish()
        for other in self._heartbeats():
            if before.get(other.rank) == other.beats and not other.ended and other.rank != self.own.rank:
                return f"{other.where()} is silent; {other.progress()}"
        return None

    def verdict(self, what: str) -> str:
        """`what` has happened, and which rank is at fault: the silent one, else the one furthest behind."""
        silent = self.culprit()
        if silent is not None:
            return silent
        last = min(self._heartbeats(), key=lambda heartbeat: heartbeat.position)
        behind = [heartbeat for heartbeat in self._heartbeats() if heartbeat.position == last.position]
        if len(behind) == self.world_size > 1:
            return (
                f"{what}, nor has any other rank: all wait at the same point (network, or a collective that differs "
                f"between ranks); {last.progress()}"
            )
        return f"{what}; {last.where()} is furthest behind: {last.progress()}"

    def _fire(self, message: str) -> None:
        text = f"the job ends here: {message}. Continue with --resume (exit code {EXIT_RANK_LOST})"
        # One unbuffered write: this process ends now, and every rank may be writing.
        os.write(sys.stderr.fileno(), f"[rank {self.own.rank}] {text}\n".encode())
        # In a thread of its own: the file system may be what hangs.
        status = (self.output_dir, text, self.own.run)
        writer = threading.Thread(
            target=write_lost_status, args=status, kwargs={"is_main": self.own.rank == 0}, daemon=True
        )
        writer.start()
        writer.join(_STATUS_S)
        self._end(EXIT_RANK_LOST)
