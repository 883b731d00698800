"""Work leases: workers claim pieces of a job through files in a shared folder.

A claim is a file that only one process can create. It is valid while its owner is alive: each worker touches a
sign-of-life file of its own and removes it on exit. If the owner's sign is too old, or its process on this machine has
ended, the next worker that asks takes over the claim. A piece has two owners only if a process was suspended for longer
than the timeout and then resumes: the work is done twice, and the merge uses one of two equal outcomes.
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
    """The claims of one worker, as a context that releases all of them on exit.

    Args:
        folder: A folder on a file system that all workers share.
        worker: A name that is unique among live workers.
        timeout_s: A worker without a sign of life for this long is considered dead.
    """

    def __init__(self, folder: Path, worker: str, timeout_s: float):
        self._folder, self.worker, self._timeout_s = folder, worker, timeout_s
        self._sign = folder / f"{worker}.alive"
        self._held: set[str] = set()
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._show_life, name="leases", daemon=True)

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
        """Claims a piece; False if a live worker holds it."""
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
        """Releases a piece, finished or not: the outcomes record what is finished."""
        self._held.discard(piece)
        self._path(piece).unlink(missing_ok=True)

    def _is_free(self, path: Path) -> bool:
        """Whether a claim's owner is dead, or is a previous run of this worker."""
        try:
            owner = path.read_text(encoding="ascii")
            age_s = self._now() - path.stat().st_mtime
        except FileNotFoundError:
            return False  # just released: the next call gets it
        if not owner:  # just created, or its creator was killed before it wrote its name
            return age_s > self._timeout_s
        return owner == self.worker or not self._is_alive(owner)

    def _take_over(self, path: Path) -> bool:
        """Replaces a dead owner by this worker; False if another worker does, or has."""
        lock = path.with_suffix(".lock")
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            with suppress(FileNotFoundError):
                if self._now() - lock.stat().st_mtime > self._timeout_s:
                    lock.unlink()  # its creator was killed; the next call gets it
            return False
        try:
            if not self._is_free(path):  # another worker was faster
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
        """The time of the file system, since clocks of machines differ."""
        os.utime(self._sign)
        return self._sign.stat().st_mtime

    def _show_life(self) -> None:
        while not self._leaving.wait(self._timeout_s / 4):
            try:
                os.utime(self._sign)
            except OSError as error:  # such as a stalled file system; other workers may consider this one dead
                logger.warning("%s cannot be touched: %s", self._sign, error)

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
