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
from collections.abc import Callable, Iterator
from pathlib import Path

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
    """The exit code of an error whose message names the fix; None for any other, which is raised with its traceback."""
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return EXIT_CANNOT_SAVE
    return 1 if isinstance(error, ValueError) else getattr(error, "exit_code", None)


@contextlib.contextmanager
def process_end(output_dir: Path, *, is_main: bool, leave_group: Callable[[], None]) -> Iterator[None]:
    """Ends the process according to the outcome of its body: status.json, a log line, the exit code.

    An error without an exit code is re-raised. After a lost rank the process ends at once, because libraries would wait
    at exit for the missing rank.

    Args:
        output_dir: Where the main rank writes status.json.
        is_main: Whether this is rank 0.
        leave_group: Leaves the process group; called after success and after an interruption.
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
    """Writes OUTPUT/status.json, the outcome of the last start: launchers may swallow exit codes."""
    path = output_dir / "status.json"
    if not output_dir.is_dir():
        return
    try:
        write_durably(path, json.dumps({"exit_code": exit_code, "message": message}) + "\n", sync=False)
    except OSError as error:  # the log has the message, and the exit code is unaffected
        logger.warning("%s cannot be written: %s", path, error)
