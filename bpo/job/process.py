"""Process identity and liveness: host, boot, process id and start time tell a process from any later one.

A process id means nothing in another PID namespace, such as another container of the host, nor where /proc hides it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

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
