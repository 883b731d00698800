"""Exit codes, the exceptions that carry them, and process termination under a scheduler.

The codes are from sysexits.h where one fits, so they do not collide with a shell's (126 and above) or
Python's (1, 2).
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bpo.job.durable import write_durably

logger = logging.getLogger(__name__)

# EX_IOERR: no checkpoint can be written. Free disk space, then --resume; a requeue would fail again.
EXIT_CANNOT_SAVE = 74
# EX_TEMPFAIL: stopped by a signal after writing a checkpoint; restart. slurm/train.sh requeues on it.
EXIT_INTERRUPTED = 75
# EX_PROTOCOL: a rank died, froze or hung; restart.
EXIT_RANK_LOST = 76
# Restarts bring no new checkpoint: do not restart. The same code as in NVIDIA's resiliency extension.
EXIT_NO_PROGRESS = 93

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}

# Parts of messages of Python, torch and the operating system, in lower case, and what to do about them.
_FIXES = (
    ("too many open files", "raise the limit of open files, for example `ulimit -n 4096`, or lower data.num_workers"),
    ("/dev/shm", "enlarge /dev/shm (in a container: --shm-size=8g) or set data.num_workers to 0"),
    ("shared memory", "enlarge /dev/shm (in a container: --shm-size=8g) or set data.num_workers to 0"),
    ("cannot allocate memory", "use a machine with more memory, or lower data.num_workers"),
    ("out of memory", "lower train.max_micro_batch_tokens, or shard more: `bpo plan` estimates what fits"),
    ("home directory", "set the environment variables HOME and USER"),
    ("getpwuid", "set the environment variables HOME and USER"),
    ("closed by peer", "another rank has ended: its log has the reason"),
    ("timed out", "a rank is slower than the timeout of collectives: set DEEPSPEED_TIMEOUT to more minutes"),
)

# How long other ranks leave the status to rank 0.
_FIRST_RANK_S = 2.0


class JobError(RuntimeError):
    """Ends a job with a message that names the fix; one traceback per rank would bury it.

    Attributes:
        exit_code: Tells a scheduler whether to restart the job.
        owns_directory: Whether the output directory belongs to this job, so that its status may be written there.
    """

    exit_code = 1
    owns_directory = True


class Interrupted(Exception):
    """The work was stopped at a boundary by a signal; a restart continues it."""

    exit_code = EXIT_INTERRUPTED


def exit_code_of(error: BaseException) -> int | None:
    """The exit code of an error whose message names the fix; None for any other: see `describe_unknown`."""
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return EXIT_CANNOT_SAVE
    if isinstance(error, ValueError):
        return None if _is_of_library(error) else 1
    return getattr(error, "exit_code", None)


def _is_of_library(error: BaseException) -> bool:
    """Whether a library raised the error: its message knows nothing of this program's files and options."""
    frames = traceback.extract_tb(error.__traceback__)
    raised_in = frames[-1].filename if frames else ""
    # Those of a worker process arrive without their traceback, raised again by the library that passes them on.
    if type(error).__module__.startswith("bpo.") or raised_in.endswith(
        ("concurrent/futures/_base.py", "torch/_utils.py")
    ):
        return False
    libraries = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    return raised_in.startswith(libraries) and not _is_own_file(raised_in)


def _is_own_file(name: str) -> bool:
    return f"{os.sep}bpo{os.sep}" in name or f"{os.sep}bpo_kernels{os.sep}" in name


@contextlib.contextmanager
def process_end(output_dir: Path, *, is_main: bool, leave_group: Callable[[], None]) -> Iterator[None]:
    """Ends the process according to the outcome of its body: status.json, a log line, the exit code.

    An error without an exit code is logged as one line; its traceback goes to a file of `output_dir`. After a lost rank
    the process ends at once, because libraries would wait at exit for the missing rank.

    Args:
        output_dir: Where the main rank writes status.json.
        is_main: Whether this is rank 0.
        leave_group: Leaves the process group; called after success and after an interruption.
    """
    code, message = 0, "finished"
    if is_main and read_status(output_dir).get("exit_code") is not None:
        write_status(output_dir, None, "starting")  # a kill from here on does not leave the outcome of the last start
    try:
        yield
    except Interrupted as reason:
        code, message = EXIT_INTERRUPTED, f"{reason}; `--resume` continues"
    except Exception as error:
        failed = exit_code_of(error)
        message = message_of(error) if failed is not None else describe_unknown(error, output_dir)
        if isinstance(error, OSError) and failed == EXIT_CANNOT_SAVE:
            where = "" if error.filename else f"{output_dir}: "
            message = f"{where}{error}; make room or repair the disk, then continue with --resume"
        logger.error("%s", message)
        if failed == EXIT_RANK_LOST:
            write_lost_status(output_dir, message, getattr(error, "run", ""), is_main=is_main)
            sys.stderr.flush()
            os._exit(failed)
        if is_main and _may_end(output_dir, owns_directory=getattr(error, "owns_directory", True)):
            write_status(output_dir, failed or 1, message)
        sys.exit(failed or 1)
    if is_main and _may_end(output_dir):
        write_status(output_dir, code, message)
    leave_group()
    if code:
        logger.warning("%s", message)
        sys.exit(code)


def message_of(error: BaseException) -> str:
    """The message without the traceback that torch puts into it for an error of a data worker."""
    text = str(error)
    return text.strip().splitlines()[-1] if "Original Traceback (most recent call last)" in text else text


def describe_unknown(error: Exception, folder: Path) -> str:
    """One line for an error that names no fix: what, where, and the file in `folder` that has the traceback.

    The traceback goes to stderr if the file cannot be written.
    """
    text = " ".join(message_of(error).split()) or "no message"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if _is_own_file(frame.filename)] or frames
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno}, {own[-1].name})" if own else ""
    fix = next((fix for known, fix in _FIXES if known in text.lower()), None)
    path = folder / f"traceback-{os.uname().nodename}-{os.getpid()}.log"
    try:
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{_now()}\n{''.join(traceback.format_exception(error))}")
        there = f"traceback: {path}"
    except OSError as reason:
        sys.stderr.write("".join(traceback.format_exception(error)))
        there = f"traceback above ({path} cannot be written: {reason.strerror})"
    return f"{type(error).__name__}: {text}{where}; {fix or 'if this does not name the cause, report it'}; {there}"


def write_status(output_dir: Path, exit_code: int | None, message: str, run: str = "") -> None:
    """Writes OUTPUT/status.json, the state of the last start: launchers may swallow exit codes.

    Args:
        exit_code: None while the start runs. A start that is killed leaves it; host, pid and start time tell which.
        run: Token of the lock under which the start runs; kept from the file if empty.
    """
    path = output_dir / "status.json"
    if not output_dir.is_dir():
        return
    state = "running" if exit_code is None else "ended"
    status: dict[str, Any] = {"state": state, "exit_code": exit_code, "message": message}
    status |= {"host": os.uname().nodename, "pid": os.getpid(), "started": _STARTED, "written": _now()}
    status["run"] = run or read_status(output_dir).get("run", "")
    try:
        write_durably(path, json.dumps(status) + "\n", sync=False)
    except OSError as error:  # the log has the message, and the exit code is unaffected
        logger.warning("%s cannot be written: %s", path, error)


def read_status(output_dir: Path) -> dict[str, Any]:
    """The content of OUTPUT/status.json; empty if there is none, or none that can be read."""
    try:
        status = json.loads((output_dir / "status.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def write_lost_status(output_dir: Path, message: str, run: str, *, is_main: bool) -> None:
    """Writes the status after a lost rank. Ranks other than 0 write it only if rank 0, the usual writer, does not."""
    if not is_main:
        time.sleep(_FIRST_RANK_S)
    status = read_status(output_dir)
    if status.get("run", "") == run and (is_main or status.get("exit_code") is None):  # else of a later start
        write_status(output_dir, EXIT_RANK_LOST, message)


def _may_end(output_dir: Path, *, owns_directory: bool = True) -> bool:
    """Whether the status is this start's to write: before it has the lock, another job may run there."""
    status = read_status(output_dir)
    own = {"host": os.uname().nodename, "pid": os.getpid(), "started": _STARTED}
    return own.items() <= status.items() or (owns_directory and status.get("state") != "running")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


_STARTED = _now()
