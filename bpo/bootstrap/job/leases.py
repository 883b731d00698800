"""Who does which piece of the work: workers claim pieces by files in a folder that all of them see.

A claim is a file that only one process can create. It holds as long as its owner lives: a worker shows that by touching
a file of its own, and takes it away when it leaves. The pieces of an owner that gave no sign for a while, or whose
process is gone from this machine, go to whoever asks next. One piece has two owners only where a process was stopped
for longer than that and then goes on: the work is done twice, and of two equal outcomes the merge takes one.
"""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from bpo.job.durable import write_durably
from bpo.job.process import ProcessIdentity, is_running, this_process

logger = logging.getLogger(__name__)


class Leases:
    """The claims of one worker, as a context: on leaving it everything this worker holds is given back.

    Args:
        folder: On a file system that all workers share.
        worker: A name that no other living process bears.
        timeout_s: A worker that gave no sign of life for so long is taken for dead.
    """

    def __init__(self, folder: Path, worker: str, timeout_s: float):
        self._folder, self.worker, self._timeout_s = folder, worker, timeout_s
        self._sign = folder / f"{worker}.alive"
        self._held: set[str] = set()
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._show_life, name="claims", daemon=True)

    def __enter__(self) -> Leases:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._sign.write_text(_sign_of(this_process()), encoding="ascii")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        self._thread.join()
        for piece in tuple(self._held):
            self.release(piece)
        self._sign.unlink(missing_ok=True)

    def take(self, piece: str) -> bool:
        """Leases a piece; False where a living worker has it."""
        path = self._path(piece)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            if not (self._is_free(path) and self._take_over(path)):
                return False
        else:
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(self.worker)
        self._held.add(piece)
        return True

    def release(self, piece: str) -> None:
        """Gives a piece back, finished or not: what is finished stands in the outcomes."""
        self._held.discard(piece)
        self._path(piece).unlink(missing_ok=True)

    def _is_free(self, path: Path) -> bool:
        """Whether a claim's owner is gone, or this worker itself in an earlier life."""
        try:
            owner = path.read_text(encoding="ascii")
            age_s = self._now() - path.stat().st_mtime
        except FileNotFoundError:
            return False  # given back this moment; whoever asks next may have it
        if not owner:  # made this moment, or by a process that was killed before it wrote its name
            return age_s > self._timeout_s
        return owner == self.worker or not self._is_alive(owner)

    def _take_over(self, path: Path) -> bool:
        """Puts this worker's name in place of a dead one's; False where another is about to, or has."""
        lock = path.with_suffix(".lock")
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            with suppress(FileNotFoundError):
                if self._now() - lock.stat().st_mtime > self._timeout_s:
                    lock.unlink()  # its maker was killed; the next call gets it
            return False
        try:
            if not self._is_free(path):  # somebody was quicker
                return False
            write_durably(path, self.worker, sync=False)
            return True
        finally:
            lock.unlink(missing_ok=True)

    def _is_alive(self, owner: str) -> bool:
        sign = self._folder / f"{owner}.alive"
        try:
            process = _process_of(sign.read_text(encoding="ascii"))
            silent_s = self._now() - sign.stat().st_mtime
        except FileNotFoundError:
            return False
        if silent_s > self._timeout_s:
            return False
        return process is None or is_running(process) is not False

    def _now(self) -> float:
        """The file system's time: the clocks of machines differ."""
        os.utime(self._sign)
        return self._sign.stat().st_mtime

    def _show_life(self) -> None:
        while not self._leaving.wait(self._timeout_s / 4):
            try:
                os.utime(self._sign)
            except OSError as error:  # a file system that hangs for a moment; others may take this worker for dead
                logger.warning("%s: no sign of life could be given (%s)", self._sign, error)

    def _path(self, piece: str) -> Path:
        return self._folder / f"{piece}.claim"


def _sign_of(process: ProcessIdentity) -> str:
    return f"{process.boot or process.host} {process.pid} {process.started} {process.host}"


def _process_of(sign: str) -> ProcessIdentity | None:
    """The process of a sign of life; None if it names none.

    The last two fields may be missing: earlier versions did not write them.
    """
    boot, pid, started, host = [*sign.split(" "), *[""] * 4][:4]
    if not pid.isdigit():
        return None
    here = os.uname().nodename
    return ProcessIdentity(host or here, boot, int(pid), None if started in ("", "None") else started)
