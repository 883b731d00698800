"""Runs one part of the GPU set in a separate process, ends it and all its children at the time limit, and cleans up.

A part is ended through its process group, with SIGTERM and two seconds later SIGKILL. Children that have left the group
are found by an environment variable that only this part's processes have. A killed compilation leaves a `lock` behind
that blocks all later ones, so locks are removed after each part.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TERM_SECONDS = 2.0
# A process that the kernel cannot end (it waits inside a driver) must not block the rest.
KILL_SECONDS = 5.0
TAIL_CHARACTERS = 4000
PART_VARIABLE = "BPO_GPU_PART"


@dataclass(frozen=True)
class Ended:
    """Outcome of a process: passed, failed or stopped (it reached its time limit)."""

    status: str
    seconds: float
    output_tail: str


@dataclass(frozen=True)
class Caches:
    """Folders shared by the parts: compiled extensions and the torch.compile cache."""

    extensions: Path
    inductor: Path

    def environment(self) -> dict[str, str]:
        return {"TORCH_EXTENSIONS_DIR": str(self.extensions), "TORCHINDUCTOR_CACHE_DIR": str(self.inductor)}

    def remove_locks(self) -> list[Path]:
        """Removes the locks of killed compilations; no part may be running."""
        locks = [path for path in self.extensions.rglob("lock") if path.is_file()]
        for path in locks:
            path.unlink(missing_ok=True)
        return locks


@contextlib.contextmanager
def opened_caches(scratch: Path) -> Iterator[Caches]:
    """Opens persistent caches in $TORCH_EXTENSIONS_DIR or the user's cache folder; if that is not writable or in use by
    another run, temporary ones below `scratch`."""
    parent = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    base = Path(parent) / "bpo-gpu-set"
    with contextlib.ExitStack() as stack:
        try:
            base.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((base / "in-use").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            base = scratch / "caches"
        caches = Caches(base / "extensions", base / "inductor")
        caches.extensions.mkdir(parents=True, exist_ok=True)
        caches.remove_locks()
        yield caches


def run_process(command: list[str], seconds: float, environment: dict[str, str]) -> Ended:
    """Runs `command` from the repository root for at most `seconds`; leaves none of its processes running."""
    begin = time.monotonic()
    token = uuid.uuid4().hex
    environment = os.environ | environment | {PART_VARIABLE: token}
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        status = "stopped"
        try:
            status = "passed" if process.wait(timeout=max(0.0, seconds)) == 0 else "failed"
        except subprocess.TimeoutExpired:
            _signal_group(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=TERM_SECONDS)
        finally:  # also if this process itself is terminated
            end_all(process, token)
        output.seek(0)
        return Ended(status, round(time.monotonic() - begin, 1), output.read()[-TAIL_CHARACTERS:])


def end_all(process: subprocess.Popen, token: str) -> None:
    """Kills the group of `process` and every other process that carries `token`."""
    _signal_group(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + KILL_SECONDS
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=KILL_SECONDS)
    # Repeated, since a process may start another one during the search.
    while (alive := carriers(token)) and time.monotonic() < deadline:
        for pid in alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def carriers(token: str) -> list[int]:
    """Running processes that were started with `token` in their environment."""
    wanted = f"{PART_VARIABLE}={token}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                found += [int(folder.name)] if state != "Z" else []
        except OSError:  # it has ended, or belongs to another user
            continue
    return found
