"""Detects compile locks left behind by killed processes and names the fix, instead of waiting silently.

torch compiles each operation, such as DeepSpeed's CPU Adam, in its own directory and creates a file `lock` there while
it compiles. A process that is killed while compiling leaves the file behind, and every later process that needs the
operation waits for it forever, without a message.

    held       a process of this machine has the file open: it is compiling, keep waiting
    possible   no process of this machine has it open, but another machine that shares the directory may
    stale      no process of this machine has it open, and no file in the directory has changed for `STALE_AFTER_S`: no
               compiler is running. Waiting ends with an error that names the file
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bpo.job.launch import ranks_from_environment

logger = logging.getLogger(__name__)

# Longer than any single source file of these operations compiles; each finished one changes a file.
STALE_AFTER_S = 600.0
NAME_AFTER_S = 15.0
CHECK_EVERY_S = 5.0
POLL_EVERY_S = 0.1

State = Literal["held", "possible", "stale"]


class StaleCompileLockError(ValueError):
    """A compile lock has no holder; names the file and the fix."""


@dataclass(frozen=True, slots=True)
class CompileLock:
    """State of a lock file.

    Attributes:
        idle_s: Seconds since any file in its directory, including the lock, last changed.
        holder: The process of this machine that has it open; None if there is none.
    """

    path: Path
    idle_s: float
    holder: int | None

    @property
    def state(self) -> State:
        if self.holder is not None:
            return "held"
        return "stale" if self.idle_s >= STALE_AFTER_S else "possible"

    def describe(self) -> str:
        """Describes the lock and the fix."""
        name = self.path.parent.name
        if self.holder is not None:
            return f"process {self.holder} of this machine is compiling `{name}` and holds {self.path}"
        idle = f"{self.idle_s / 60:.0f} minutes" if self.idle_s >= 120 else f"{self.idle_s:.0f} seconds"
        found = f"the compile lock {self.path} of `{name}` has no holder on this machine, and nothing has changed in"
        if self.state == "stale":
            return (
                f"{found} its directory for {idle}: it was left by a process that was killed while compiling. "
                f"Remove it and start again: rm {self.path}"
            )
        return (
            f"{found} its directory for {idle}. Another machine that shares the directory may be compiling; "
            f"if none is, stop this process, remove the lock and start again: rm {self.path}"
        )


def extensions_root() -> Path:
    """The root directory of compiled extensions: TORCH_EXTENSIONS_DIR, else the user's cache."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def find_locks(root: Path) -> list[CompileLock]:
    """All locks under `root`; the user's cache has one directory per Python and CUDA version."""
    found = (inspect_lock(path) for pattern in ("*/lock", "*/*/lock") for path in sorted(root.glob(pattern)))
    return [lock for lock in found if lock is not None]


def inspect_lock(path: Path) -> CompileLock | None:
    """The lock at `path`; None if it has been released."""
    try:
        path.stat()
        newest = max(entry.stat().st_mtime for entry in os.scandir(path.parent))
    except FileNotFoundError:  # the lock, or a temporary file of the compiler, was removed
        return inspect_lock(path) if path.exists() else None
    return CompileLock(path, max(0.0, time.time() - newest), find_holder(path))


def find_holder(path: Path) -> int | None:
    """The process of this machine that has `path` open; None if no inspectable process has."""
    wanted = os.path.realpath(path)
    for folder in Path("/proc").glob("[0-9]*/fd"):
        # Other users' processes cannot be inspected; the lock belongs to this user, as its directory does.
        with contextlib.suppress(OSError):
            if any(os.readlink(entry) == wanted for entry in os.scandir(folder)):
                return int(folder.parent.name)
    return None


@contextlib.contextmanager
def named_compile_locks() -> Iterator[None]:
    """Makes torch wait for compile locks with `wait_for_lock`, as a context or decorator.

    Operations are built on demand inside DeepSpeed, and only the wait itself has the path of the lock, so the wait is
    replaced. There is no overhead unless a process has to wait. Every rank raises; the first rank of each node logs.
    """
    from torch.utils.file_baton import FileBaton

    wait = FileBaton.wait

    def wait_and_name(self: FileBaton) -> None:
        wait_for_lock(Path(self.lock_file_path), reports=ranks_from_environment().local_rank == 0)

    FileBaton.wait = wait_and_name  # type: ignore[method-assign]
    try:
        yield
    finally:
        FileBaton.wait = wait  # type: ignore[method-assign]


def wait_for_lock(path: Path, *, reports: bool = True) -> None:
    """Returns when the lock is released; after `NAME_AFTER_S` logs once what it waits for.

    Raises:
        StaleCompileLockError: The lock has no holder.
    """
    started = time.monotonic()
    next_check_s = CHECK_EVERY_S
    logged = None
    while path.exists():
        time.sleep(POLL_EVERY_S)
        waited_s = time.monotonic() - started
        if waited_s < next_check_s:
            continue
        next_check_s = waited_s + CHECK_EVERY_S
        lock = inspect_lock(path)
        if lock is None:
            return
        if lock.state == "stale":
            raise StaleCompileLockError(lock.describe())
        if reports and waited_s >= NAME_AFTER_S and logged != lock.state:
            logged = lock.state
            logger.warning("waiting: %s", lock.describe())  # also on the nodes that log warnings only
