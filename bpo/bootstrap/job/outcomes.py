"""The durable record of what a bootstrapping job has finished: one JSON line an outcome, one file a rank.

A rank only ever appends to its own file and flushes it to disk after each batch, so a killed job loses at most the
batch it was working on. Everybody reads all files. A line that a kill cut short is not an outcome: its record is done
again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import sqlite3
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

from bpo.records import Provenance

logger = logging.getLogger(__name__)

DIGEST_BYTES = 16

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


def part_name(worker: int) -> str:
    """The file of a worker: a rank of a shard."""
    return f"rank-{worker:05d}.jsonl"


class PartWriter:
    """Appends outcomes to one worker's file.

    Raises:
        ValueError: Another process has the file open for writing.
    """

    def __init__(self, folder: Path, worker: int):
        self.path = folder / part_name(worker)
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
            logger.warning("%s: dropping an unfinished last line (%d bytes)", self.path, size - complete)
            self._file.truncate(complete)
        self._file.seek(0, os.SEEK_END)


class PartReader:
    """Finds the outcomes of all ranks; each `poll` reads only what is new.

    What is in memory does not grow with the outcomes: a temporary database knows where each stands, and its text is
    read from the part when it is asked for. Of two outcomes with one key the first one found stands: a second one could
    only be equal.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._offsets: dict[Path, int] = {}
        self._parts: list[Path] = []
        self._num_of: Counter[str] = Counter()
        self._open: tuple[int, BinaryIO] | None = None  # the part that was asked last
        self._database = sqlite3.connect("")  # a temporary file of its own, removed when it is closed
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute(
            "CREATE TABLE outcome (source TEXT, id BLOB, status TEXT, reason TEXT, part INTEGER, start INTEGER, "
            "PRIMARY KEY (source, id)) WITHOUT ROWID"
        )

    def poll(self, part: Path | None = None) -> int:
        """Reads complete new lines, of all parts or of one, and returns the number of new outcomes."""
        before = self._database.total_changes
        for path in sorted(self.folder.glob("rank-*.jsonl")) if part is None else [part]:
            if path not in self._offsets:
                self._offsets[path] = 0
                self._parts.append(path)
            with path.open("rb") as file:
                file.seek(self._offsets[path])
                for source, rows in groupby(self._new_rows(file, path), key=itemgetter(0)):
                    known = self._database.total_changes
                    self._database.executemany("INSERT OR IGNORE INTO outcome VALUES (?, ?, ?, ?, ?, ?)", rows)
                    self._num_of[source] += self._database.total_changes - known
        return self._database.total_changes - before

    def num_of(self, source: str) -> int:
        """Outcomes of a source."""
        return self._num_of[source]

    def num_by(self, worker: int) -> int:
        """Outcomes that stand in the part of a worker."""
        numbers = [number for number, path in enumerate(self._parts) if path.name == part_name(worker)]
        found = self._database.execute("SELECT COUNT(*) FROM outcome WHERE part = ?", (numbers or [-1])[:1])
        return int(found.fetchone()[0])

    def __len__(self) -> int:
        return self._num_of.total()

    def __contains__(self, key: tuple[str, str]) -> bool:
        """Whether (source, record id) has an outcome."""
        return self.has(key[0], record_digest(key[1]))

    def has(self, source: str, digest: bytes) -> bool:
        found = self._database.execute("SELECT 1 FROM outcome WHERE source = ? AND id = ?", (source, digest))
        return found.fetchone() is not None

    def get(self, key: tuple[str, str]) -> Outcome | None:
        """The outcome of (source, record id), read from its part."""
        found = self._database.execute(
            "SELECT part, start FROM outcome WHERE source = ? AND id = ?", (key[0], record_digest(key[1]))
        ).fetchone()
        if found is None:
            return None
        if self._open is None or self._open[0] != found[0]:
            if self._open is not None:
                self._open[1].close()
            self._open = found[0], self._parts[found[0]].open("rb")
        self._open[1].seek(found[1])
        return _outcome_of(self._open[1].readline())

    def broken(self) -> list[bytes]:
        """`record_digest` of every record that cannot be used."""
        return [row[0] for row in self._database.execute("SELECT DISTINCT id FROM outcome WHERE status = 'broken'")]

    def counts(self) -> Counter[tuple[str, str, str]]:
        """(source, status, reason) -> outcomes; the reason is that of a refusal, else empty."""
        rows = self._database.execute("SELECT source, status, reason, COUNT(*) FROM outcome GROUP BY 1, 2, 3")
        return Counter({(source, status, reason): count for source, status, reason, count in rows})

    def _new_rows(self, file: BinaryIO, path: Path) -> Iterator[tuple[str, bytes, str, str, int, int]]:
        part = self._parts.index(path)
        for line in file:
            if not line.endswith(b"\n"):
                return  # its writer is not done with it
            start = self._offsets[path]
            self._offsets[path] += len(line)
            if not line.strip():
                continue
            try:
                outcome = _outcome_of(line)
            except (ValueError, KeyError, TypeError) as error:
                # A machine that lost power may leave zeros where a line was to stand.
                logger.warning("%s: a line is not an outcome and is done again (%s)", path, error)
                continue
            reason = outcome.reason if outcome.status == "refused" else ""
            yield outcome.source, record_digest(outcome.record_id), outcome.status, reason, part, start


def _outcome_of(line: bytes) -> Outcome:
    return Outcome.from_json(json.loads(line.decode("utf-8", "surrogatepass")))


def record_digest(record_id: str) -> bytes:
    """16 bytes that stand for an id."""
    return hashlib.blake2b(record_id.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


class AtomicLines:
    """JSON lines that appear under their name only when all of them are there."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = _temporary_name(path)
        self._file = self._temporary.open("wb")

    def write(self, obj: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(obj, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")

    def commit(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)

    def discard(self) -> None:
        """Leaves nothing behind; does nothing after `commit`."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Puts a whole file in place of another at once: no reader ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _temporary_name(path: Path) -> Path:
    # Not by the number of the process: those of two machines may be equal.
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
