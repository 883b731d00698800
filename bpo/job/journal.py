"""Append-only JSON-lines files: one writer per file, any number of readers; only a torn last line is ever lost.

A kill or power failure may leave a line without its end, or zeros in place of a line. The next writer drops the torn
end; readers skip lines that they cannot parse, and the work that such a line recorded is repeated.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from bpo.job.durable import sync_file

logger = logging.getLogger(__name__)
T = TypeVar("T")


def to_line(entry: Any, *, ensure_ascii: bool = True) -> bytes:
    """Encodes an entry as one line; half surrogate pairs survive."""
    return json.dumps(entry, ensure_ascii=ensure_ascii).encode("utf-8", "surrogatepass") + b"\n"


def from_line(line: bytes) -> Any:
    return json.loads(line.decode("utf-8", "surrogatepass"))


class JournalWriter:
    """Appends lines to a journal, as a context or until `close`.

    Args:
        exclusive: Hold a lock on the file while it is open.
        sync_each: Return from each `append` when its lines are on disk; otherwise only `close` syncs, and a killed
            process (but not a power failure) leaves every appended line.

    Raises:
        ValueError: `exclusive`, and another process holds the lock.
    """

    def __init__(self, path: Path, *, exclusive: bool, sync_each: bool = True):
        self.path, self._sync_each = path, sync_each
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            if exclusive:
                self._lock()
            self._drop_torn_line()
        except BaseException:
            self._file.close()
            raise

    def append(self, lines: bytes) -> None:
        self._file.write(lines)
        self._file.flush()
        if self._sync_each:
            sync_file(self._file.fileno())

    def close(self) -> None:
        try:
            if not self._sync_each:
                sync_file(self._file.fileno())
        finally:
            self._file.close()

    def __enter__(self) -> JournalWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            # flock, not lockf: a POSIX lock ends when this process closes any descriptor of the file, as readers do.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"{self.path} is being written by another process; wait for that job or end it, then start again"
                ) from error
            # Some cluster file systems have no locks; the lock only guards against starting a job twice.
            logger.info("%s: no file locks here (%s)", self.path, error.strerror)

    def _drop_torn_line(self) -> None:
        size = self._file.seek(0, os.SEEK_END)
        complete = size
        while complete:  # back to the last end of a line
            start = max(0, complete - (1 << 16))
            self._file.seek(start)
            end = self._file.read(complete - start).rfind(b"\n")
            if end >= 0:
                complete = start + end + 1
                break
            complete = start
        if complete < size:
            logger.warning("%s: the last line was cut short; dropping its %d bytes", self.path, size - complete)
            self._file.truncate(complete)
        self._file.seek(0, os.SEEK_END)


class JournalReader:
    """Reads a journal that may still be written: each `poll` continues after the last complete line."""

    def __init__(self, path: Path):
        self.path = path
        self._offset = self._num_lines = 0

    def poll(self, parse: Callable[[Any], T]) -> Iterator[tuple[int, T]]:
        """The offset in the file and the parsed value of each new complete line.

        Args:
            parse: Turns a JSON value into an entry. Lines for which it raises ValueError, LookupError, TypeError or
                AttributeError are skipped with a warning, as are lines that are not JSON.
        """
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # still being written, or torn
                start = self._offset
                self._offset += len(line)
                self._num_lines += 1
                if not line.strip():
                    continue
                try:
                    entry = parse(from_line(line))
                except (ValueError, LookupError, TypeError, AttributeError) as error:  # or of another shape
                    logger.warning("%s:%d: unreadable line, skipped (%s)", self.path, self._num_lines, error)
                    continue
                yield start, entry
