"""The durable record of what a bootstrapping job has finished: one JSON line an outcome, one file a rank.

A rank only ever appends to its own file and flushes it to disk after each batch, so a killed job loses at most the
batch it was working on. Everybody reads all files. A line that a kill cut short is not an outcome: its record is done
again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from bpo.records import Provenance

logger = logging.getLogger(__name__)

Status = Literal["kept", "refused", "failed", "broken"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one record under one source of negatives.

    Attributes:
        status: `kept`; `refused` by a validator; `failed` (no answer for this record from this source); `broken`
            (the record itself cannot be used, such as an unreadable image).
        text: The completion, kept or refused.
        reason: The validator's reason, or the error.
        detail: What the validator found in this text.
    """

    record_id: str
    source: str
    status: Status
    text: str = ""
    reason: str = ""
    provenance: Provenance | None = None
    detail: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.source, self.record_id

    def to_line(self) -> bytes:
        fields = {
            "id": self.record_id,
            "source": self.source,
            "status": self.status,
            "text": self.text,
            "reason": self.reason,
            "provenance": self.provenance.to_json() if self.provenance else None,
            "detail": self.detail,
        }
        return json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"

    @classmethod
    def from_json(cls, obj: dict[str, Any]) -> Outcome:
        provenance = Provenance(**obj["provenance"]) if obj["provenance"] else None
        return cls(obj["id"], obj["source"], obj["status"], obj["text"], obj["reason"], provenance, obj["detail"])


class PartWriter:
    """Appends outcomes to one rank's file.

    Raises:
        ValueError: Another process has the file open for writing.
    """

    def __init__(self, folder: Path, rank: int):
        self.path = folder / f"rank-{rank:05d}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            self._lock()
        except ValueError:
            self._file.close()
            raise
        self._drop_torn_line()

    def append(self, outcomes: Iterable[Outcome]) -> None:
        """Writes outcomes and returns when they are on disk."""
        self._file.write(b"".join(outcome.to_line() for outcome in outcomes))
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _lock(self) -> None:
        try:
            # flock, not lockf: a POSIX lock ends when this process closes any descriptor of the file, as readers do.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"{self.path} is being written by another process; wait for that job or end it, then start again"
                ) from error
            # Some cluster file systems know no locks; the lock only guards against a user's slip.
            logger.info("%s: no file locks here (%s)", self.path, error.strerror)

    def _drop_torn_line(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            logger.warning("%s: dropping an unfinished last line (%d bytes)", self.path, len(content) - complete)
            self._file.truncate(complete)
        self._file.seek(0, os.SEEK_END)


class PartReader:
    """Reads the outcomes of all ranks; each `poll` reads only what is new.

    Attributes:
        outcomes: (source, record id) -> outcome. The first one stands: a second one could only be equal.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.outcomes: dict[tuple[str, str], Outcome] = {}
        self._offsets: dict[Path, int] = {}

    def poll(self) -> int:
        """Reads complete new lines and returns the number of new outcomes."""
        before = len(self.outcomes)
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            offset = self._offsets.get(path, 0)
            with path.open("rb") as file:
                file.seek(offset)
                content = file.read()
            complete = content.rfind(b"\n") + 1
            self._offsets[path] = offset + complete
            for line in content[:complete].split(b"\n"):
                if line.strip():
                    self._add(line, path)
        return len(self.outcomes) - before

    def _add(self, line: bytes, path: Path) -> None:
        try:
            outcome = Outcome.from_json(json.loads(line.decode("utf-8", "surrogatepass")))
        except (ValueError, KeyError, TypeError) as error:
            # A machine that lost power may leave zeros where a line was to stand.
            logger.warning("%s: a line is not an outcome and is done again (%s)", path, error)
            return
        self.outcomes.setdefault(outcome.key, outcome)


def write_atomically(path: Path, content: bytes) -> None:
    """Puts a whole file in place of another at once: no reader ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
