"""A crash-safe lock: one job per output directory.

OUTPUT/job.lock          owner of the directory: host, process, job id, a random token
OUTPUT/job.lock.TOKEN    beats: rewritten every few seconds by the owner

The lock is created by link(), which is atomic on local disks, Lustre and NFS, or by an exclusive open() where there are
no hard links; flock is not used, because many clusters mount their file systems without it. Whether the owner lives is
decided without clocks: in the same PID namespace by its process, elsewhere by watching its beats for `STALE_S`
seconds. A job restarted by SLURM takes the lock of its earlier start back.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import threading
import time
from pathlib import Path
from typing import Any

from bpo.job.exits import JobError, exit_code_of
from bpo.job.launch import restart_count
from bpo.job.process import ProcessIdentity, is_running, this_process

logger = logging.getLogger(__name__)

LOCK = "job.lock"
BEAT_EVERY_S = 5.0
# Longer than the attribute cache of NFS (60 s).
STALE_S = 75.0
_FULL = (errno.ENOSPC, errno.EDQUOT)
# From link() on file systems without hard links: FAT, some network and user-space file systems.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EOPNOTSUPP}


class RunLockError(JobError):
    """The output directory belongs to another job or cannot be written; names the owner and the fix."""

    owns_directory = False


def owner_record() -> dict[str, Any]:
    return {
        **this_process()._asdict(),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "start": restart_count(),
        "token": secrets.token_hex(8),
    }


def _name(owner: dict[str, Any]) -> str:
    job = f", job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid')} on {owner.get('host')}{job}"


class RunLock:
    """Holds the lock of an output directory until `release`.

    Raises:
        RunLockError: another job owns it and is alive, or the directory cannot be written.
    """

    def __init__(self, output_dir: Path, *, beat_every_s: float = BEAT_EVERY_S, stale_s: float = STALE_S):
        self.path = output_dir / LOCK
        self.owner = owner_record()
        self._beat_every_s, self._stale_s = beat_every_s, stale_s
        self._beats = output_dir / f"{LOCK}.{self.owner['token']}"
        self._ended = threading.Event()
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            while not self._create():
                self._take_over()
        except OSError as error:
            refused = RunLockError(_cannot_write(output_dir, error))
            refused.exit_code = exit_code_of(error) or refused.exit_code
            with contextlib.suppress(OSError):
                self._beats.unlink()
            raise refused from error
        except RunLockError:
            self._beats.unlink(missing_ok=True)
            raise
        self._thread = threading.Thread(target=self._keep_beating, name="run lock", daemon=True)
        self._thread.start()

    def _create(self) -> bool:
        self._beats.write_text("0", encoding="utf-8")
        temporary = self._beats.with_suffix(self._beats.suffix + ".new")
        temporary.write_text(json.dumps(self.owner), encoding="utf-8")
        try:
            self._move_to_lock(temporary)
        except FileExistsError:
            return False
        return True

    def _move_to_lock(self, source: Path) -> None:
        """Gives `source` the name of the lock unless that exists, on NFS too; removes `source` in any case."""
        try:
            os.link(source, self.path)  # complete: no reader sees half a lock
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with self.path.open("xb") as file:
                file.write(source.read_bytes())
        finally:
            source.unlink()

    def read(self) -> dict[str, Any] | None:
        """The current owner of the lock; None if it is free."""
        content = self._content()
        return None if content is None else _owner_of(content)

    def _content(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    def _take_over(self) -> None:
        """Removes the lock of a dead job; raises for one that is alive."""
        content = self._content()
        if content is None:
            return
        other = _owner_of(content)
        why = self._why_gone(other)
        if why is None:
            raise RunLockError(
                f"{self.path.parent} is in use by {_name(other)}; wait for it, stop it, or give train.output_dir "
                f"another directory. If you are sure that it has ended, remove {self.path}"
            )
        moved = self.path.with_name(f"{LOCK}.{self.owner['token']}.stale")
        try:
            os.rename(self.path, moved)
        except FileNotFoundError:
            return  # another job was faster; check again
        if content != moved.read_bytes():
            self._move_to_lock(moved)  # not the lock that was checked: another job has taken over; restore it
            return
        logger.warning("%s: taken over from %s, which %s", self.path, _name(other), why)
        if other["token"]:
            (self.path.parent / f"{LOCK}.{other['token']}").unlink(missing_ok=True)
        moved.unlink()

    def _why_gone(self, other: dict[str, Any]) -> str | None:
        running = is_running(ProcessIdentity(other["host"], other.get("boot", ""), other["pid"], other.get("started")))
        if running is not None:
            return None if running else "no longer runs"
        # Not just the same job: its tasks run at the same time.
        if self.owner["job"] and other.get("job") == self.owner["job"] and other.get("start", 0) < self.owner["start"]:
            return "was an earlier start of this job"
        logger.warning("%s: owned by %s; watching it for %.0f s", self.path, _name(other), self._stale_s)
        beats = self.path.parent / f"{LOCK}.{other['token']}"
        before = _sign_of_life(beats) if other["token"] else None
        deadline = time.monotonic() + self._stale_s
        while time.monotonic() < deadline:
            time.sleep(min(self._beat_every_s, self._stale_s / 4))
            if other["token"] and _sign_of_life(beats) != before:
                return None
        return f"gave no sign of life for {self._stale_s:.0f} s"

    def _keep_beating(self) -> None:
        count = 0
        while not self._ended.wait(self._beat_every_s):
            count += 1
            try:
                self._beats.write_text(str(count), encoding="utf-8")
            except OSError as error:  # a full disk must not end the thread: this job still holds the lock
                logger.warning("%s cannot be written: %s", self._beats, error)
                with contextlib.suppress(OSError):
                    os.utime(self._beats)  # a sign of life that needs no space

    def lost(self) -> str | None:
        """Names the new owner if another job has taken over the directory because this one seemed dead; else None."""
        owner = self.read()
        if owner is not None and owner.get("token") == self.owner["token"]:
            return None
        whose = "no job (the file was removed)" if owner is None else _name(owner)
        return f"{self.path} now belongs to {whose}; this job stops to keep its files out of the other's"

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        owner = self.read()
        if owner is not None and owner.get("token") == self.owner["token"]:
            self.path.unlink()
        self._beats.unlink(missing_ok=True)


def _sign_of_life(beats: Path) -> tuple[bytes, int] | None:
    """Content and time of the beats, which are compared for change only; None if there are none."""
    try:
        return beats.read_bytes(), beats.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _owner_of(content: bytes) -> dict[str, Any]:
    """The owner in a lock; of a damaged lock, one without a token, which is unknown and has no beats to watch."""
    try:
        owner = json.loads(content)
        process = [owner["host"], owner.get("boot", ""), owner["token"]]
        if all(isinstance(value, str) for value in process) and isinstance(owner["pid"], int):
            return owner
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    return {"host": "?", "pid": 0, "token": ""}


def _cannot_write(output_dir: Path, error: OSError) -> str:
    why = {errno.EROFS: "it is on a read-only file system", errno.EACCES: "this user may not write there"}
    reason = why.get(error.errno or 0, error.strerror)
    fix = "Free space there, then continue with --resume," if error.errno in _FULL else "Make it writable"
    return f"train.output_dir {output_dir} cannot be written: {reason}. {fix} or give another directory"
