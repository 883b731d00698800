"""Process identity and liveness: host, boot, process id and start time tell a process from any later one.

A process id means nothing in another PID namespace, such as another container of the host, nor where /proc hides it.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
from pathlib import Path
from typing import NamedTuple

# Open files of a process without workers, and of a batch in transfer: one per tensor. Locks of a queue.
_OPEN_FILES = 64
_FILES_PER_BATCH = 16
_LOCKS = 4

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class ProcessIdentity(NamedTuple):
    """A process, unique over hosts and reboots.

    Attributes:
        host: Host name; names repeat in clouds and containers, hence `boot`.
        boot: Boot id of the host and PID namespace; empty if they are unknown.
        started: Start time in clock ticks since boot; None if unknown.
    """

    host: str
    boot: str
    pid: int
    started: str | None


def process_start(pid: int) -> str | None:
    """The start time of a process of this host in clock ticks since boot; None if it does not run."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *rest = stat.rsplit(")", 1)[1].split()
    return None if state in "ZX" else rest[18]


def boot_id() -> str:
    """The boot id of the host and the PID namespace of this process; empty if /proc is not of this namespace."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return ""
        return f"{_BOOT_ID.read_text(encoding='utf-8').strip()}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def this_process() -> ProcessIdentity:
    pid = os.getpid()
    return ProcessIdentity(os.uname().nodename, boot_id(), pid, process_start(pid))


def is_running(process: ProcessIdentity) -> bool | None:
    """Whether a process runs; None if that cannot be known from here.

    Unknown are processes of another host, boot or PID namespace, and those that /proc hides from this user.
    """
    if not process.boot or (process.host, process.boot) != (os.uname().nodename, boot_id()):
        return None
    found = process_start(process.pid)
    if found is None and not Path(f"/proc/{process.pid}").exists():
        try:
            os.kill(process.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:  # of another user
            return None
        return None
    return found is not None and process.started in (None, found)


def prepare_for_workers(num_workers: int, prefetch_factor: int) -> None:
    """Checks that data workers can hand over their batches; raises the limit of open files as far as that is allowed.

    Without this, a worker that cannot share a tensor drops the batch, and the process waits for it forever.

    Raises:
        ValueError: too few open files or too little shared memory; names the fix.
    """
    if not num_workers:
        return
    needed = _OPEN_FILES + _FILES_PER_BATCH * num_workers * prefetch_factor
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= limit < needed:  # -1: no limit
        limit = needed if most < 0 else min(needed, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
        if limit < needed:
            raise ValueError(
                f"data.num_workers {num_workers} needs {needed} open files, the limit is {limit}: raise it "
                f"(`ulimit -n {needed}`), or set data.num_workers to 0"
            )
    try:
        locks = [multiprocessing.Semaphore() for _ in range(_LOCKS + _LOCKS * num_workers)]
    except OSError as error:
        raise ValueError(
            f"data.num_workers {num_workers} needs shared memory, and /dev/shm has too little ({error.strerror}): "
            "enlarge it (in a container: --shm-size=8g), or set data.num_workers to 0"
        ) from error
    del locks
