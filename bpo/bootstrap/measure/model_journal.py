"""What a model says about each record of a sample, written to disk as it is computed; ranks share the records.

    PARTS/IDENTITY/identity.json     everything that the values depend on
    PARTS/IDENTITY/rank-00000.jsonl  one JSON line per record

Each rank appends to its own file and reads all of them. Values of different identities are in different folders, so
that none is ever mixed with values of other options, and a return to earlier options finds the earlier values.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

from bpo.job.durable import write_durably
from bpo.job.journal import JournalReader, JournalWriter, to_line
from bpo.job.launch import Ranks
from bpo.job.signals import StopRequest

logger = logging.getLogger(__name__)
_POLL_S = 1.0


def folder_of(parts: Path, identity: dict[str, Any]) -> Path:
    """The folder of these values; created, with a log line about values of other options, if there is none."""
    text = json.dumps(identity, indent=1, sort_keys=True)
    folder = parts / hashlib.sha256(text.encode()).hexdigest()[:16]
    path = folder / "identity.json"
    if path.exists():
        return folder
    for other in sorted(parts.glob("*/identity.json")):
        stored = json.loads(other.read_text(encoding="utf-8"))
        now = json.loads(text)
        differing = [name for name in {**stored, **now} if stored.get(name) != now.get(name)]
        changes = "; ".join(f"{name} was {stored.get(name)!r}, is {now.get(name)!r}" for name in differing)
        logger.warning("%s has values of other options, which are not used: %s", other.parent, changes)
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(path, text + "\n")  # racing ranks write the same bytes
    return folder


class ModelJournal:
    """The values of each record, by its place in the sample.

    Args:
        folder: From `folder_of`.
        ranks: The ranks that share the records.

    Raises:
        ValueError: Another process writes to this rank's file.
    """

    def __init__(self, folder: Path, num_records: int, ranks: Ranks):
        self.folder, self.num_records, self.ranks = folder, num_records, ranks
        self.values: dict[int, dict[str, Any]] = {}
        self._readers: dict[Path, JournalReader] = {}
        self._writer = JournalWriter(folder / f"rank-{ranks.rank:05d}.jsonl", exclusive=True)
        self.poll()

    def missing(self) -> list[int]:
        """This rank's share of the records without values."""
        mine = range(self.ranks.rank, self.num_records, self.ranks.world_size)
        return [place for place in mine if place not in self.values]

    def put(self, place: int, values: dict[str, Any]) -> None:
        """Adds the values of a record; returns when they are on disk."""
        self._writer.append(to_line({"place": place, **values}))
        self.values[place] = values

    def poll(self) -> int:
        """Reads new lines of all ranks; returns the number of new records."""
        before = len(self.values)
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            for _, (place, values) in self._readers.setdefault(path, JournalReader(path)).poll(_entry):
                self.values[place] = values
        return len(self.values) - before

    def all(self, stall_timeout_s: float, stop: StopRequest | None) -> list[dict[str, Any]]:
        """The values of all records, in order, waiting for those of other ranks.

        Raises:
            TimeoutError: No new values for `stall_timeout_s` seconds.
            Interrupted: A signal was received.
        """
        last = time.monotonic()
        while len(self.values) < self.num_records:
            if self.poll():
                last = time.monotonic()
            elif time.monotonic() - last > stall_timeout_s:
                raise TimeoutError(
                    f"{self.num_records - len(self.values)} of {self.num_records} records have no values, and no rank "
                    f"has added any for {stall_timeout_s:g} s; start again: {self.folder} keeps what is finished"
                )
            else:
                if stop is not None:
                    stop.check(f"{len(self.values)} of {self.num_records} records are kept")
                time.sleep(min(_POLL_S, stall_timeout_s))
        return [self.values[place] for place in range(self.num_records)]

    def close(self) -> None:
        self._writer.close()


def _entry(line: Any) -> tuple[int, dict[str, Any]]:
    values = dict(line)
    return int(values.pop("place")), values
