"""Compile locks that a killed process has left behind: named, with the way out, instead of waited for in silence.

torch compiles an operation, such as DeepSpeed's CPU Adam, in a directory of its own and creates a file `lock` there for
as long as it takes. A process that is killed meanwhile leaves the file behind, and every later process that needs the
operation waits for it without end and without a message.

    held       a process of this machine has the file open: it compiles, and waiting is right
    possible   nothing here has it open, but another machine that shares the directory may
    stale      nothing here has it open, and for `STALE_AFTER_S` no file of the directory has changed: no compiler is
               at work. Waiting ends with an error that names the file
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

# No single source file of the operations that bpo uses compiles for longer; each one that is done changes a file.
STALE_AFTER_S = 600.0
NAME_AFTER_S = 15.0
CHECK_EVERY_S = 5.0
POLL_EVERY_S = 0.1

State = Literal["held", "possible", "stale"]


class StaleCompileLockError(ValueError):
    """A compile lock has no holder; names the file and how to go on."""


@dataclass(frozen=True, slots=True)
class CompileLock:
    """A lock file as it was found.

    Attributes:
        idle_s: Seconds since any file of its directory, the lock included, has changed.
        holder: The process of this machine that has it open; None where there is none.
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
        """What it is and what to do about it, in one sentence or two."""
        name = self.path.parent.name
        if self.holder is not None:
            return f"process {self.holder} of this machine compiles `{name}` and holds {self.path}"
        idle = f"{self.idle_s / 60:.0f} minutes" if self.idle_s >= 120 else f"{self.idle_s:.0f} seconds"
        found = f"the compile lock {self.path} of `{name}` has no holder on this machine, and nothing has changed in"
        if self.state == "stale":
            return (
                f"{found} its directory for {idle}: a process that was killed while compiling left it. "
                f"Remove it and start again: rm {self.path}"
            )
        return (
            f"{found} its directory for {idle}. Another machine that shares the directory may be compiling; "
            f"if none is, stop this process, remove the lock and start again: rm {self.path}"
        )


def extensions_root() -> Path:
    """The directory under which torch compiles: TORCH_EXTENSIONS_DIR, else the user's cache."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def find_locks(root: Path) -> list[CompileLock]:
    """All locks under `root`; in the user's cache each Python and CUDA version has a directory of its own."""
    found = (inspect_lock(path) for pattern in ("*/lock", "*/*/lock") for path in sorted(root.glob(pattern)))
    return [lock for lock in found if lock is not None]


def inspect_lock(path: Path) -> CompileLock | None:
    """The lock at `path`; None if it was released in the meantime."""
    try:
        path.stat()
        newest = max(entry.stat().st_mtime for entry in os.scandir(path.parent))
    except FileNotFoundError:  # released, or a compiler's temporary file that is gone: look again
        return inspect_lock(path) if path.exists() else None
    return CompileLock(path, max(0.0, time.time() - newest), find_holder(path))


def find_holder(path: Path) -> int | None:
    """The process of this machine that has `path` open; None if none of those that may be looked into has."""
    wanted = os.path.realpath(path)
    for folder in Path("/proc").glob("[0-9]*/fd"):
        # Processes of other users may not be looked into; the lock is of this user, as its directory is.
        with contextlib.suppress(OSError):
            if any(os.readlink(entry) == wanted for entry in os.scandir(folder)):
                return int(folder.parent.name)
    return None


@contextlib.contextmanager
def named_compile_locks() -> Iterator[None]:
    """While the context is open (or the decorated function runs), torch waits for compile locks by `wait_for_lock`.

    Operations are built on demand, deep inside DeepSpeed, and only the wait itself knows for which lock: so the wait is
    replaced. Nothing runs, and nothing costs anything, unless a process has to wait. Every rank raises; the first of
    each node reports.
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
    """Returns when the lock is released; after `NAME_AFTER_S` says once what it waits for.

    Raises:
        StaleCompileLockError: The lock has no holder.
    """
    started = time.monotonic()
    next_check_s = CHECK_EVERY_S
    said = None
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
        if reports and waited_s >= NAME_AFTER_S and said != lock.state:
            said = lock.state
            logger.log(logging.INFO if lock.state == "held" else logging.WARNING, "waiting: %s", lock.describe())
