"""Runs a stage in processes of its own, so that it leaves no memory to the next, and passes signals on to them."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from bpo.job.exits import EXIT_INTERRUPTED
from bpo.job.signals import StopRequest
from bpo.rounds.stages import Stage

_POLL_S = 0.2
# After one process has failed, the others may write what they have, as after a lost rank.
_GRACE_S = 120.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # loaded here: a forked child must not wait for a lock that another thread held


def run_stage(stage: Stage, processes: int, stop: StopRequest | None) -> int:
    """Runs the stage's command to its end; returns its exit code, or that of the first process that failed.

    There is no launcher between: it would die of a signal and leave its workers behind. The processes end with this
    one, however it ends. Their output is appended to the stage's log.
    """
    count = processes if stage.kind.shared else 1
    port = _free_port()
    command = command_of(stage)
    with stage.log_file.open("ab") as log:
        started = [
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(rank, count, port),
                preexec_fn=_end_with_parent,
            )
            for rank in range(count)
        ]
        try:
            return _wait(started, stop)
        finally:
            for process in started:
                if process.poll() is None:
                    process.kill()
                    process.wait()


def command_of(stage: Stage) -> list[str]:
    """The command of one process."""
    module = ["-m", "bpo.train"] if stage.kind.command == ("train",) else ["-m", "bpo.cli", *stage.kind.command]
    return [sys.executable, *module, "--config", str(stage.config_file)]


def _wait(processes: list[subprocess.Popen[bytes]], stop: StopRequest | None) -> int:
    told, deadline = False, float("inf")
    while True:
        codes = [process.poll() for process in processes]
        failed = next((code for code in codes if code), 0)
        if None not in codes:
            return failed if failed >= 0 else 128 - failed
        if stop is not None and stop.received and not told:
            told = True
            for process in processes:
                process.send_signal(signal.SIGTERM)
        if failed and failed != EXIT_INTERRUPTED:
            deadline = min(deadline, time.monotonic() + _GRACE_S)
        if time.monotonic() > deadline:
            return failed if failed >= 0 else 128 - failed
        time.sleep(_POLL_S)


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    binaries = str(Path(sys.executable).parent)  # contains ninja, which compiles DeepSpeed's operations
    environment = {**os.environ, "PATH": binaries + os.pathsep + os.environ.get("PATH", "")}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    if count > 1:
        environment |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    return environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end_with_parent() -> None:
    """Asks Linux for SIGTERM when the parent dies: a stage must not run on beside the one that a restart begins.

    In a session of its own, so that Ctrl-C reaches it once, from this process.
    """
    os.setsid()
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
