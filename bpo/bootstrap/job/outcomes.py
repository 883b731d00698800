"""Outcome journal of a bootstrapping job: one JSON line per outcome, one file per worker.

Each worker only appends to its own file and syncs it to disk after each batch, so a killed job loses at most the
current batch. All workers read all files. A record whose line was torn by a kill is generated again.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Protocol

from bpo.job.journal import JournalReader, JournalWriter, from_line, to_line
from bpo.records import Provenance

DIGEST_BYTES = 16

Status = Literal["kept", "refused", "failed", "broken", "scored"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of one record for one source of negatives.

    Attributes:
        status: `kept`; `refused` by a validator; `failed` (no answer for this record from this source); `broken`
            (the record itself is unusable, such as an unreadable image); `scored` (the merge decides, with `scores`).
        text: The completion, kept or refused.
        reason: The validator's reason, or the error.
        detail: The validator's finding in this text.
        weight: Weight of the completion, decided at the merge; not in the journal.
        scores: Of `edit`: words -> their blind log-probability in place of the annotation's.
    """

    record_id: str
    source: str
    status: Status
    text: str = ""
    reason: str = ""
    provenance: Provenance | None = None
    detail: str = ""
    weight: float = 1.0
    scores: Mapping[str, float] | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.source, self.record_id

    def to_line(self, mark: str = "") -> bytes:
        fields: dict[str, Any] = {
            "id": self.record_id,
            "source": self.source,
            "status": self.status,
            "text": self.text,
            "reason": self.reason,
            "provenance": self.provenance.to_json() if self.provenance else None,
            "detail": self.detail,
        }
        if self.scores is not None:
            fields["scores"] = dict(self.scores)
        return to_line(fields | {"identity": mark} if mark else fields, ensure_ascii=False)

    @classmethod
    def from_json(cls, obj: dict[str, Any]) -> Outcome:
        provenance = Provenance(**obj["provenance"]) if obj["provenance"] else None
        answer = obj["text"], obj["reason"], provenance, obj["detail"]
        return cls(obj["id"], obj["source"], obj["status"], *answer, scores=obj.get("scores"))


class Outcomes(Protocol):
    """Looks up the outcome of (source or candidate, record id): an `OutcomeReader`, or a dict."""

    def get(self, key: tuple[str, str], /) -> Outcome | None: ...


def journal_name(worker: int) -> str:
    """File name of a worker, which is a rank of a shard."""
    return f"rank-{worker:05d}.jsonl"


class OutcomeWriter:
    """Appends outcomes to one worker's file, as a context.

    Args:
        mark: Source of an outcome -> digest of the options that it was generated with, by which readers select.

    Raises:
        ValueError: Another process has the file open for writing.
    """

    def __init__(self, folder: Path, worker: int, mark: Callable[[str], str] = lambda source: ""):
        self._mark = mark
        self._journal = JournalWriter(folder / journal_name(worker), exclusive=True)
        self.path = self._journal.path

    def append(self, outcomes: Iterable[Outcome]) -> None:
        """Writes outcomes and returns when they are on disk."""
        self._journal.append(b"".join(outcome.to_line(self._mark(outcome.source)) for outcome in outcomes))

    def __enter__(self) -> OutcomeWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.close()


class OutcomeReader:
    """Looks up the outcomes of all workers; each `poll` reads only new lines.

    Memory does not grow with the outcomes: a temporary database stores the position of each, and its text is read from
    the journal on demand. Of two outcomes with the same key, the first found is used; the second can only be equal.

    Args:
        accepts: Whether to use outcomes of this source with this mark; others are only counted.

    Attributes:
        num_unused: Source -> outcomes that were not accepted.
    """

    def __init__(self, folder: Path, accepts: Callable[[str, str], bool] = lambda source, mark: True):
        self.folder, self._accepts = folder, accepts
        self.num_unused: Counter[str] = Counter()
        self._journals: list[JournalReader] = []
        self._numbers: dict[Path, int] = {}
        self._num_of: Counter[str] = Counter()
        self._open: tuple[int, BinaryIO] | None = None  # the journal read last
        self._database = sqlite3.connect("")  # a temporary file, removed when it is closed
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute(
            "CREATE TABLE outcome (source TEXT, id BLOB, status TEXT, reason TEXT, part INTEGER, start INTEGER, "
            "PRIMARY KEY (source, id)) WITHOUT ROWID"
        )

    def poll(self, journal: Path | None = None) -> int:
        """Reads complete new lines of all journals, or of one, and returns the number of new outcomes."""
        before = self._database.total_changes
        for path in sorted(self.folder.glob("rank-*.jsonl")) if journal is None else [journal]:
            if path not in self._numbers:
                self._numbers[path] = len(self._journals)
                self._journals.append(JournalReader(path))
            for source, rows in groupby(self._new_rows(self._numbers[path]), key=itemgetter(0)):
                known = self._database.total_changes
                self._database.executemany("INSERT OR IGNORE INTO outcome VALUES (?, ?, ?, ?, ?, ?)", rows)
                self._num_of[source] += self._database.total_changes - known
        return self._database.total_changes - before

    def num_of(self, source: str) -> int:
        """Number of outcomes of a source."""
        return self._num_of[source]

    def num_by(self, worker: int) -> int:
        """Number of outcomes in the journal of a worker."""
        numbers = [number for path, number in self._numbers.items() if path.name == journal_name(worker)]
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
        """The outcome of (source, record id), read from its journal."""
        found = self._database.execute(
            "SELECT part, start FROM outcome WHERE source = ? AND id = ?", (key[0], record_digest(key[1]))
        ).fetchone()
        if found is None:
            return None
        if self._open is None or self._open[0] != found[0]:
            if self._open is not None:
                self._open[1].close()
            self._open = found[0], self._journals[found[0]].path.open("rb")
        self._open[1].seek(found[1])
        return Outcome.from_json(from_line(self._open[1].readline()))

    def broken(self) -> list[bytes]:
        """`record_digest` of every unusable record."""
        return [row[0] for row in self._database.execute("SELECT DISTINCT id FROM outcome WHERE status = 'broken'")]

    def counts(self) -> Counter[tuple[str, str, str]]:
        """(source, status, reason) -> number of outcomes; the reason is empty unless refused."""
        rows = self._database.execute("SELECT source, status, reason, COUNT(*) FROM outcome GROUP BY 1, 2, 3")
        return Counter({(source, status, reason): count for source, status, reason, count in rows})

    def _new_rows(self, number: int) -> Iterator[tuple[str, bytes, str, str, int, int]]:
        for start, (outcome, mark) in self._journals[number].poll(_marked_outcome):
            if not self._accepts(outcome.source, mark):
                self.num_unused[outcome.source] += 1
                continue
            reason = outcome.reason if outcome.status == "refused" else ""
            yield outcome.source, record_digest(outcome.record_id), outcome.status, reason, number, start


def _marked_outcome(obj: dict[str, Any]) -> tuple[Outcome, str]:
    return Outcome.from_json(obj), str(obj.get("identity", ""))


def record_digest(record_id: str) -> bytes:
    """A 16-byte digest of a record id."""
    return hashlib.blake2b(record_id.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()
