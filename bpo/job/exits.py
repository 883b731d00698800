"""Exit codes, the exceptions that carry them, and the end of a process that a scheduler may start again.

The codes are those of sysexits.h where it has a fitting one: they do not collide with a shell's (126 and above) or
Python's (1, 2).
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from bpo.job.durable import write_durably

logger = logging.getLogger(__name__)

# EX_IOERR: no checkpoint can be written. Make room, then --resume; a requeue would only repeat it.
EXIT_CANNOT_SAVE = 74
# EX_TEMPFAIL: a signal came and a checkpoint is written; start again. slurm/train.sh requeues on it.
EXIT_INTERRUPTED = 75
# EX_PROTOCOL: a rank died, froze or hangs; start again.
EXIT_RANK_LOST = 76
# Restarts bring no new checkpoint: do not start again. The number that NVIDIA's resiliency extension uses for it.
EXIT_NO_PROGRESS = 93

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}


class JobError(RuntimeError):
    """Ends a job with a message that says what to do; a traceback per rank would bury it.

    Attributes:
        exit_code: Tells a scheduler whether to start the job again.
        owns_directory: Whether the output directory is this job's, and its status may be written there.
    """

    exit_code = 1
    owns_directory = True


class Interrupted(Exception):
    """The work stopped at a boundary because a signal asked for it; a further start continues it."""

    exit_code = EXIT_INTERRUPTED


def exit_code_of(error: BaseException) -> int | None:
    """The exit code of an error whose message says what to do; None for any other, which deserves its traceback."""
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return EXIT_CANNOT_SAVE
    return 1 if isinstance(error, ValueError) else getattr(error, "exit_code", None)


@contextlib.contextmanager
def process_end(output_dir: Path, *, is_main: bool, leave_group: Callable[[], None]) -> Iterator[None]:
    """Turns how its body ends into the end of the process: status.json, a log line, the exit code.

    An error without an exit code passes through. After a lost rank the process ends at once: libraries would wait at
    exit for ranks that are gone.

    Args:
        output_dir: Gets status.json from the main rank.
        is_main: Whether this is rank 0.
        leave_group: Leaves the process group, after success and after an interruption.
    """
    code, message = 0, "finished"
    try:
        yield
    except Interrupted as reason:
        code, message = EXIT_INTERRUPTED, f"{reason}; `--resume` continues"
    except Exception as error:
        failed = exit_code_of(error)
        if failed is None:
            raise
        logger.error("%s", error)
        if is_main and getattr(error, "owns_directory", True):
            write_status(output_dir, failed, str(error))
        if failed == EXIT_RANK_LOST:
            sys.stderr.flush()
            os._exit(failed)
        sys.exit(failed)
    if is_main:
        write_status(output_dir, code, message)
    leave_group()
    if code:
        logger.warning("%s", message)
        sys.exit(code)


def write_status(output_dir: Path, exit_code: int, message: str) -> None:
    """OUTPUT/status.json: how the last start ended; exit codes get lost in launchers, a file does not."""
    path = output_dir / "status.json"
    if not output_dir.is_dir():
        return
    try:
        write_durably(path, json.dumps({"exit_code": exit_code, "message": message}) + "\n", sync=False)
    except OSError as error:  # the message is in the log as well, and the exit code is unaffected
        logger.warning("%s cannot be written: %s", path, error)
